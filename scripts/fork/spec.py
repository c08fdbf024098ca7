"""Reads `patches/fork.toml`: the pinned upstream, the variants and their requirements."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fork.errors import ForkError


@dataclass(frozen=True)
class Variant:
    """One build of the fork: which patches go in, and the local version it carries."""

    name: str
    version: str
    patches: tuple[Path, ...]


@dataclass(frozen=True)
class ForkSpec:
    """The pinned upstream wheel and what is made of it."""

    upstream_version: str
    platform: str
    sha256: Mapping[str, str]
    requirements: tuple[str, ...]
    variants: Mapping[str, Variant]

    def wheel_name(self, version: str, python_tag: str) -> str:
        """File name of the wheel of `version`, upstream's or ours."""
        return f"sglang-{version}-{python_tag}-{python_tag}-{self.platform}.whl"

    def pinned_sha256(self, python_tag: str) -> str:
        """The upstream wheel's digest, or a clear refusal for a Python without one."""
        try:
            return self.sha256[python_tag]
        except KeyError:
            known = ", ".join(sorted(self.sha256))
            raise ForkError(f"no SGLang is pinned for {python_tag}; there is {known}") from None

    def variant(self, name: str) -> Variant:
        """The variant called `name`."""
        try:
            return self.variants[name]
        except KeyError:
            known = ", ".join(sorted(self.variants))
            raise ForkError(f"no variant {name!r}; there is {known}") from None


def load_spec(patches_dir: Path) -> ForkSpec:
    """Read the specification in `patches_dir` and resolve its patch patterns."""
    with (patches_dir / "fork.toml").open("rb") as stream:
        raw = tomllib.load(stream)
    upstream = raw["upstream"]
    variants = {
        name: Variant(
            name=name,
            version=f"{upstream['version']}+{table['local']}",
            patches=_match(patches_dir, table["patches"]),
        )
        for name, table in raw["variants"].items()
    }
    return ForkSpec(
        upstream_version=upstream["version"],
        platform=upstream["platform"],
        sha256=upstream["sha256"],
        requirements=tuple(raw["requirements"]["base"]),
        variants=variants,
    )


def _match(folder: Path, patterns: list[str]) -> tuple[Path, ...]:
    """Files that the patterns name, in order of number; a pattern that names none is a mistake."""
    found: set[Path] = set()
    for pattern in patterns:
        matches = set(folder.glob(pattern))
        if not matches:
            raise ForkError(f"no patch in {folder} matches {pattern!r}")
        found |= matches
    return tuple(sorted(found))

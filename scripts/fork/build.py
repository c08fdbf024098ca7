"""Turns the pinned wheel into a variant's wheel, or into a source tree to work on."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fork import metadata, patching, upstream, wheel
from fork.errors import ForkError
from fork.spec import ForkSpec, Variant
from stamp import Stamp, fingerprint

# The extra under which upstream's whole list of requirements can still be had.
_FULL_EXTRA = "cuda"


def build_wheel(spec: ForkSpec, variant: Variant, python_tag: str, build_dir: Path) -> Path:
    """Build the wheel of `variant` under `build_dir`, unless it is up to date; return its path."""
    wheels = build_dir / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    target = wheels / spec.wheel_name(variant.version, python_tag)
    stamp = Stamp(target.with_suffix(".stamp"))
    inputs = _inputs(spec, variant, python_tag)
    if target.is_file() and stamp.matches(inputs):
        return target
    source = upstream.fetch_wheel(spec, python_tag, build_dir / "upstream")
    with tempfile.TemporaryDirectory(dir=build_dir) as scratch:
        tree, packed = Path(scratch) / "tree", Path(scratch) / target.name
        modes = wheel.unpack(source, tree)
        patching.apply_patches(tree, variant.patches)
        _rebrand(tree, spec, variant)
        wheel.pack(tree, packed, modes)
        stamp.clear()
        packed.replace(target)
    stamp.write(inputs)
    return target


def make_source_tree(
    spec: ForkSpec, variant: Variant, python_tag: str, build_dir: Path, tree: Path
) -> None:
    """Unpack upstream into the new folder `tree`, as a git repository with a commit per patch."""
    if tree.exists():
        raise ForkError(f"{tree} exists already")
    wheel.unpack(upstream.fetch_wheel(spec, python_tag, build_dir / "upstream"), tree)
    patching.commit_patches(tree, variant.patches)


def _inputs(spec: ForkSpec, variant: Variant, python_tag: str) -> str:
    builder = [*Path(__file__).parent.glob("*.py")]
    return fingerprint(
        [*variant.patches, *builder],
        variant.version,
        spec.pinned_sha256(python_tag),
        *spec.requirements,
    )


def _rebrand(tree: Path, spec: ForkSpec, variant: Variant) -> None:
    """Give the unpacked wheel the variant's version and requirements."""
    info = wheel.dist_info(tree)
    fields = info / "METADATA"
    fields.write_text(
        metadata.rewrite(fields.read_text(), variant.version, spec.requirements, _FULL_EXTRA)
    )
    info.rename(tree / f"sglang-{variant.version}.dist-info")
    # What the server reports about itself must tell the fork from upstream, too.
    version_file = tree / "sglang" / "_version.py"
    version_file.write_text(
        version_file.read_text().replace(f"'{spec.upstream_version}'", f"'{variant.version}'")
    )

"""What the repository says about its patches in several places is the same everywhere."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fork import load_spec
from fork.patching import header
from tests.support.places import ROOT

PATCHES = sorted((ROOT / "patches").glob("*.patch"))
NAMES = [patch.name for patch in PATCHES]


def test_patches_are_numbered_without_gaps() -> None:
    numbers = [int(name.partition("-")[0]) for name in NAMES]

    assert numbers == list(range(1, len(PATCHES) + 1))


@pytest.mark.parametrize("patch", PATCHES, ids=NAMES)
def test_header_says_why_and_what_retires_it(patch: Path) -> None:
    title, *rest = header(patch).splitlines()

    assert title
    assert any(line.startswith("Why: ") for line in rest)
    assert any(line.startswith("Retire when: ") for line in rest)


def test_readme_lists_every_patch() -> None:
    readme = (ROOT / "patches" / "README.md").read_text()

    assert [name for name in NAMES if f"| `{name}` |" not in readme] == []


def test_package_asks_for_the_version_that_the_build_makes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = load_spec(ROOT / "patches").variant("kunserve").version

    assert project["optional-dependencies"]["serve"] == [f"sglang=={version}"]


def test_guards_variant_is_part_of_the_fork() -> None:
    spec = load_spec(ROOT / "patches")
    fork, guards = spec.variant("kunserve").patches, spec.variant("guards").patches

    assert list(fork) == PATCHES
    assert set(guards) < set(fork)

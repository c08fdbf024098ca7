"""Which of our patches still fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fork.errors import ForkError
from fork.patching import apply_patches


@dataclass(frozen=True, slots=True)
class Trial:
    """One patch; `problem` is empty if it fits, and else what git says."""

    name: str
    files: tuple[str, ...]
    problem: str


def try_patches(tree: Path, patches: Iterable[Path]) -> list[Trial]:
    """Apply each to `tree` as the build does, those after one that fails too."""
    return [Trial(patch.name, touched(patch), _problem(tree, patch)) for patch in patches]


def touched(patch: Path) -> tuple[str, ...]:
    """The files that a patch changes, as paths in the wheel."""
    prefix = "+++ b/"
    lines = patch.read_text().splitlines()
    return tuple(line.removeprefix(prefix) for line in lines if line.startswith(prefix))


def _problem(tree: Path, patch: Path) -> str:
    try:
        apply_patches(tree, [patch])
    except ForkError as error:
        return str(error).partition("\n")[2]
    return ""

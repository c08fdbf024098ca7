"""Applies patches with `git apply`: no fuzz, and all of a patch or none of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from fork.errors import ForkError

_IDENTITY = ("-c", "user.name=fork", "-c", "user.email=fork@localhost")


def apply_patches(tree: Path, patches: Iterable[Path]) -> None:
    """Apply `patches` in order to the files under `tree`."""
    for patch in patches:
        _git(tree, "apply", "--whitespace=nowarn", str(patch.resolve()), about=patch.name)


def commit_patches(tree: Path, patches: Iterable[Path]) -> None:
    """Make `tree` a git repository with upstream as the first commit and one more per patch.

    A commit's message is the patch's header, so `git show --format=%B` writes the patch back.
    """
    _git(tree, "init", "--quiet")
    _commit_all(tree, "upstream")
    for patch in patches:
        apply_patches(tree, [patch])
        _commit_all(tree, header(patch))


def header(patch: Path) -> str:
    """The text above the first diff: why the patch exists and what would retire it."""
    return patch.read_text().partition("diff --git ")[0].strip()


def _commit_all(tree: Path, message: str) -> None:
    _git(tree, "add", "--all", "--force")
    _git(
        tree, *_IDENTITY, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "--message", message
    )


def _git(tree: Path, *arguments: str, about: str = "the source tree") -> None:
    if shutil.which("git") is None:
        raise ForkError("git is needed to apply the patches, and is not installed")
    done = subprocess.run(
        ["git", *arguments],
        cwd=tree,
        env=_environment(tree),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ForkError(f"git {arguments[0]} failed for {about}:\n{done.stderr.strip()}")


def _environment(tree: Path) -> dict[str, str]:
    """An environment in which git sees no repository around `tree`.

    Inside one, `git apply` silently skips paths that the repository does not expect, and the
    variables that git sets for its hooks would point it at the wrong repository altogether.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return environment | {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}

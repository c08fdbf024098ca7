"""Fingerprints of inputs, so that a build step runs only when its inputs changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def fingerprint(files: Iterable[Path], *extra: str) -> str:
    """Digest the names and contents of `files`, and `extra` values that matter as well."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name}\0{sha256(file)}\n".encode())
    for value in extra:
        digest.update(f"{value}\n".encode())
    return digest.hexdigest()


def sha256(file: Path) -> str:
    """Digest one file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Stamp:
    """A small file that remembers the fingerprint of the inputs of the last success."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def matches(self, value: str) -> bool:
        """Whether the last success had these inputs."""
        return self._path.is_file() and self._path.read_text().strip() == value

    def clear(self) -> None:
        """Forget the last success, before its result is touched."""
        self._path.unlink(missing_ok=True)

    def write(self, value: str) -> None:
        """Remember a success."""
        self._path.write_text(value + "\n")

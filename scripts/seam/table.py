"""Reads the table of SGLang's names: `python/kunserve_sglang/sglang_seam/contract/*.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from seam.errors import SeamError

FLAGS = "flags"
ENVIRONMENT = "environment"


class Use(StrEnum):
    """What the seam does with a name."""

    IMPORTS = "imports"
    EXTENDS = "extends"
    """A class of ours inherits from it."""
    OVERRIDES = "overrides"
    HOOKS = "hooks"
    """SGLang's plugin registry, or an assignment, puts a function of ours in its place."""
    CALLS = "calls"
    READS = "reads"
    WRITES = "writes"
    MIRRORS = "mirrors"
    """The seam does not name it: it repeats what it does, or relies on what it does."""
    SETS = "sets"
    """A flag or an environment variable."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name: `scope` is a module, `module:Class`, `flags` or `environment`."""

    scope: str
    name: str
    uses: frozenset[Use]
    why: str
    file: str

    @property
    def key(self) -> str:
        """How records and reports call it."""
        return f"{self.scope}{'.' if ':' in self.scope else ':'}{self.name}"

    @property
    def module(self) -> str:
        """The SGLang module, or the scope itself where that is none."""
        return self.scope.partition(":")[0]

    @property
    def owner(self) -> str:
        """The class, or nothing."""
        return self.scope.partition(":")[2]


def load_table(folder: Path) -> list[Entry]:
    """All entries of all files, in order; raises `SeamError` for one that makes no sense."""
    entries = [entry for file in sorted(folder.glob("*.toml")) for entry in _entries_of(file)]
    if not entries:
        raise SeamError(f"{folder} has no tables")
    seen: set[str] = set()
    for entry in entries:
        if entry.key in seen:
            raise SeamError(f"{entry.file}: {entry.key} is listed twice")
        seen.add(entry.key)
    return entries


def _entries_of(file: Path) -> Iterator[Entry]:
    with file.open("rb") as stream:
        scopes = tomllib.load(stream)
    for scope, names in scopes.items():
        for name, text in names.items():
            uses, _, why = text.partition(":")
            yield Entry(
                scope, name, _uses(uses, f"{file.name}: {scope} {name}"), why.strip(), file.stem
            )


def _uses(text: str, place: str) -> frozenset[Use]:
    try:
        return frozenset(Use(word.strip()) for word in text.split(","))
    except ValueError:
        known = ", ".join(Use)
        raise SeamError(f"{place}: {text!r} is no list of uses; there are {known}") from None

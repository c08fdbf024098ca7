"""One thing that is wrong, or may become so."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Level(StrEnum):
    """An error keeps a cluster from serving; a warning is what it would serve worse for."""

    ERROR = "error"
    WARNING = "warning"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`name` is for programs; `what` is wrong and what to `do` about it are a line each."""

    name: str
    level: Level
    what: str
    do: str


def error(name: str, what: str, do: str) -> Finding:
    return Finding(name=name, level=Level.ERROR, what=what, do=do)


def warning(name: str, what: str, do: str) -> Finding:
    return Finding(name=name, level=Level.WARNING, what=what, do=do)

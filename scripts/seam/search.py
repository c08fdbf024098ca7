"""Where else a name may be that is no longer where it was."""

from __future__ import annotations

import re

from seam.facts import Fact, Kind
from seam.module import instance_attributes, members
from seam.source import Source
from seam.table import ENVIRONMENT, FLAGS, Entry

_MAX_PLACES = 3
"""A name that is in more places says nothing."""

_MIN_TELLING = 10
"""Letters of a method's name by which it is known even in another class."""


def elsewhere(entry: Entry, old: Fact, source: Source) -> list[str]:
    """Places that define a name like it; none if nothing like it is found."""
    if entry.scope in (ENVIRONMENT, FLAGS):
        return []
    if not entry.owner:
        return _few(_top_level(entry.name, old.kind, source))
    places = _members(entry, source)
    near = [f"{entry.module}:", old.place.partition(":")[0] + ":"]
    return _few(
        [place for place, owner in places if owner == entry.owner]
        or [place for place, _ in places if place.startswith(tuple(near))]
        or [
            place
            for place, _ in places
            if old.kind is Kind.FUNCTION and len(entry.name) >= _MIN_TELLING
        ]
    )


def _few(places: list[str]) -> list[str]:
    return places if len(places) <= _MAX_PLACES else []


def _top_level(name: str, kind: Kind, source: Source) -> list[str]:
    word = re.escape(name)
    shape = {Kind.CLASS: rf"^\s*class {word}\b", Kind.FUNCTION: rf"^\s*(async )?def {word}\b"}
    found = []
    for module in source.files_with(shape.get(kind, rf"^{word}\s*[:=]"), name):
        parsed = source.module(module)
        if parsed is not None and name in parsed.definitions:
            found.append(f"{module}:{name}")
    return found


def _members(entry: Entry, source: Source) -> list[tuple[str, str]]:
    """Classes that define the name or assign it on their instances: the place, and the class."""
    name = entry.name
    word = re.escape(name)
    found = []
    for module in source.files_with(rf"(def {word}\b|^\s+{word}\s*[:=]|\.{word}\s*[:=,])", name):
        parsed = source.module(module)
        for owner, node in parsed.classes.items() if parsed else ():
            if name in members(node) or name in instance_attributes(node):
                found.append((f"{module}:{owner}.{name}", owner))
    return found

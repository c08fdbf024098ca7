"""What has become of a name from one version of SGLang to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from seam.errors import SeamError
from seam.facts import Fact, Kind
from seam.search import elsewhere
from seam.signature import Signature
from seam.source import Source
from seam.table import Entry, Use
from seam.usage import Usage


class Change(StrEnum):
    """What has changed, worst first."""

    GONE = "gone"
    MOVED = "moved"
    SIGNATURE = "signature"
    """In a way that our calls or overrides do not survive."""
    PARAMETERS = "parameters"
    """The signature, in a way that our calls do not notice."""
    VALUE = "value"
    """A default, or a constant."""
    BODY = "body"


BREAKING = (Change.GONE, Change.MOVED, Change.SIGNATURE)

_DATA = {Kind.ATTRIBUTE, Kind.FIELD, Kind.PROPERTY}
_STRICT = {Use.OVERRIDES, Use.HOOKS}
"""A function of ours takes the call that was meant for SGLang's, so it must take every argument."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One name that is not what it was; `was` and `now` are for people."""

    entry: Entry
    change: Change
    was: str
    now: str

    @property
    def breaks(self) -> bool:
        """Whether something stops working; of what is only mirrored, nothing does at once."""
        return self.change in BREAKING and self.entry.uses != {Use.MIRRORS}


def facts_of(entries: Sequence[Entry], source: Source) -> dict[str, Fact]:
    """Of every entry, for keeping; raises `SeamError` naming those that are not there."""
    found = {entry.key: source.fact(entry) for entry in entries}
    missing = [key for key, fact in found.items() if fact is None]
    if missing:
        raise SeamError("not in this SGLang:\n" + "\n".join(f"  {key}" for key in missing))
    return {key: fact for key, fact in found.items() if fact is not None}


def compare(
    entries: Sequence[Entry], pinned: Mapping[str, Fact], source: Source, usage: Usage
) -> list[Finding]:
    """All changes, worst first; raises `SeamError` for a name of which nothing is kept."""
    unknown = [entry.key for entry in entries if entry.key not in pinned]
    if unknown:
        raise SeamError(
            f"nothing is kept of {', '.join(unknown)}: run scripts/seam_report.py --update"
        )
    found = [compare_one(entry, pinned[entry.key], source, usage) for entry in entries]
    order = list(Change)
    return sorted(
        (finding for finding in found if finding is not None),
        key=lambda finding: (not finding.breaks, order.index(finding.change), finding.entry.key),
    )


def compare_one(entry: Entry, old: Fact, source: Source, usage: Usage) -> Finding | None:
    """None if the name is all that it was."""
    new = source.fact(entry)
    if new is None:
        places = elsewhere(entry, old, source)
        gone = Change.MOVED if places else Change.GONE
        return Finding(entry, gone, old.place, ", ".join(places))
    if Use.HOOKS in entry.uses and new.place != old.place:
        # A hook replaces a name where it is defined, so one that is only imported is no use.
        return Finding(entry, Change.MOVED, old.place, new.place)
    if not _same_kind(entry, old, new):
        return Finding(entry, Change.SIGNATURE, f"a {old.kind}", f"a {new.kind}")
    change = _signature_change(entry, old, new, usage)
    if change is not None:
        return Finding(entry, change, old.signature, new.signature)
    if old.body != new.body:
        return Finding(entry, Change.BODY, "", "")
    return None


def _same_kind(entry: Entry, old: Fact, new: Fact) -> bool:
    if {old.kind, new.kind} <= _DATA:
        return new.kind is old.kind or Use.WRITES not in entry.uses or new.kind is not Kind.PROPERTY
    return new.kind is old.kind


def _signature_change(entry: Entry, old: Fact, new: Fact, usage: Usage) -> Change | None:
    unused = old.kind is Kind.CLASS and entry.uses == {Use.IMPORTS}
    if old.signature == new.signature or unused:
        return None
    if new.kind in _DATA:
        both = old.signature and new.signature
        return Change.VALUE if both else None  # else it is assigned elsewhere than it was
    if new.kind not in (Kind.FUNCTION, Kind.CLASS):
        return Change.VALUE
    was, now = Signature.parse(old.signature), Signature.parse(new.signature)
    if now.same_parameters(was):
        return Change.VALUE
    # Our own `__init__` passes on whatever it gets.
    if entry.uses & _STRICT and old.kind is Kind.FUNCTION and entry.name != "__init__":
        return Change.SIGNATURE
    calls = usage.calls_of(entry)
    return Change.PARAMETERS if calls is None or now.serves(calls, was) else Change.SIGNATURE

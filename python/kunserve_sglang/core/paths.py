"""Looking up paths as they stand in a request line.

A path has one spelling: nothing is decoded, merged or cut off before it is compared, so that nobody
behind can read another path in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")

_SEGMENT = rb"(?!\.{1,2}(?:/|%2[Ff]|\Z))[A-Za-z0-9._~:@+=,-]{1,512}"
_SLASH = rb"(?:/|%2[Ff])"
_PARAMETERS: Mapping[str, bytes] = {
    "": _SEGMENT,
    # Names of models are paths of hubs or of file systems. Clients write their slashes either way,
    # and it is the same parameter of the same route to whoever decodes them.
    ":path": rb"%b?%b(?:%b%b){0,32}" % (_SLASH, _SEGMENT, _SLASH, _SEGMENT),
}


class Lookup(Generic[T]):
    """What belongs to a path, by the bytes of a request line; parameters are in braces."""

    def __init__(self, entries: Iterable[tuple[str, T]]) -> None:
        self._exact: dict[bytes, T] = {}
        self._patterns: list[tuple[re.Pattern[bytes], T]] = []
        for path, entry in entries:
            if "{" in path:
                self._patterns.append((_pattern(path), entry))
            else:
                self._exact[path.encode()] = entry

    def find(self, path: bytes) -> T | None:
        """`path` is what stands before the query; None if it is no path of this table."""
        found = self._exact.get(path)
        if found is not None:
            return found
        return next((entry for form, entry in self._patterns if form.fullmatch(path)), None)


def _pattern(path: str) -> re.Pattern[bytes]:
    parts = re.split(r"\{\w+((?::path)?)\}", path)
    return re.compile(
        b"".join(
            _PARAMETERS[part] if index % 2 else re.escape(part.encode())
            for index, part in enumerate(parts)
        )
    )

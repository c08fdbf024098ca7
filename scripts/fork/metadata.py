"""Rewrites a wheel's METADATA: its version, and what it requires."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

_REQUIREMENT = "Requires-Dist: "


def rewrite(text: str, version: str, base: Iterable[str], full_extra: str) -> str:
    """Return METADATA `text` with a new version and only `base` as its requirements.

    Upstream's unconditional requirements become the extra `full_extra`; its extras stay.
    """
    head, blank, description = text.partition("\n\n")
    fields = head.split("\n")
    requirements = [f.removeprefix(_REQUIREMENT) for f in fields if f.startswith(_REQUIREMENT)]
    kept = [f for f in fields if not f.startswith((_REQUIREMENT, "Version: ", "Provides-Extra: "))]
    extras = [f for f in fields if f.startswith("Provides-Extra: ")]
    rewritten = chain(
        kept[:2],  # Metadata-Version and Name come first, and Version after them
        [f"Version: {version}"],
        kept[2:],
        (_REQUIREMENT + requirement for requirement in base),
        [f"Provides-Extra: {full_extra}"],
        (_REQUIREMENT + requirement for requirement in _as_extra(requirements, full_extra)),
        extras,
        (_REQUIREMENT + requirement for requirement in requirements if _is_extra(requirement)),
    )
    return "\n".join(rewritten) + blank + description


def _as_extra(requirements: Iterable[str], extra: str) -> Iterator[str]:
    for requirement in requirements:
        if _is_extra(requirement):
            continue
        name, _, marker = requirement.partition(";")
        condition = f'extra == "{extra}"'
        if marker:
            condition = f"({marker.strip()}) and {condition}"
        yield f"{name.strip()}; {condition}"


def _is_extra(requirement: str) -> bool:
    return "extra ==" in requirement

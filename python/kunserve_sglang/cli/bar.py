"""What an instance's memory is used for, as numbers and as a bar."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from kunserve_sglang.api.types import InstanceStatus

_WIDTH = 24

# Use, glyph, glyph where there is only ASCII, colour: legible without colours too.
_USES = (
    ("parameters", "█", "#", "blue"),
    ("used", "▓", "=", "green"),
    ("cached", "▒", "-", "yellow"),
    ("free", "░", ".", "bright_black"),
)


class Shares(msgspec.Struct, frozen=True, kw_only=True):
    """Fractions of an instance's pages; they sum to 1."""

    parameters: float
    used: float
    cached: float
    free: float


def memory_shares(instance: InstanceStatus, instances: Sequence[InstanceStatus]) -> Shares | None:
    """How the pages of `instance` are used; None until it has reported.

    Its KV pages hold its layers for every owner in its group, so they are as full as the slots of
    the whole group are. What of them is neither used nor cached counts as free.
    """
    pages = instance.pages
    if pages is UNSET or instance.group is UNSET or not pages.total:
        return None
    slots = [i.slots for i in instances if i.id in instance.group and i.slots is not UNSET]
    capacity = sum(s.capacity for s in slots) or 1
    kv = pages.kv / pages.total
    used = kv * min(1.0, sum(s.used for s in slots) / capacity)
    cached = min(kv - used, kv * sum(s.cached for s in slots) / capacity)
    parameters = pages.parameters / pages.total
    return Shares(
        parameters=parameters, used=used, cached=cached, free=1 - parameters - used - cached
    )


class MemoryBar:
    """Draws `Shares`; as wide as there is room for."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(_WIDTH, options.max_width)
        end, total = 0, 0.0
        for use, glyph, plain, colour in _USES:
            begin, total = end, total + getattr(self._shares, use)
            # Rounded ends, not rounded widths: so they always add up to the whole bar.
            end = round(min(1.0, total) * width)
            yield Segment(
                (plain if options.ascii_only else glyph) * (end - begin), Style(color=colour)
            )

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(4, _WIDTH)


class Legend:
    """The legend of the bar."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = Text()
        for use, glyph, plain, colour in _USES:
            text.append(f"{plain if options.ascii_only else glyph} ", colour)
            text.append(f"{use}  ", "dim")
        yield text

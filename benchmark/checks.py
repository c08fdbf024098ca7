"""What a measurement has to show: a value, a bar, and whether it was met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Check:
    """One claim of the benchmark; `point` is its number in the docs, NaN never meets a bar."""

    point: int
    what: str
    value: float
    bar: str
    ok: bool


def at_least(point: int, what: str, value: float, bar: float) -> Check:
    return Check(point, what, value, f">= {bar:g}", value >= bar)


def at_most(point: int, what: str, value: float, bar: float) -> Check:
    return Check(point, what, value, f"<= {bar:g}", value <= bar)


@dataclass(frozen=True, slots=True)
class Section:
    """The outcome of one part of the benchmark: figures to read, and checks to pass."""

    figures: dict[str, Any]
    checks: tuple[Check, ...] = ()


def merge(
    old: Mapping[str, Any], sections: Mapping[str, Section], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The results with `sections` in place of what `old` has of the same names; `about` is new.

    Rows are the figures of the section `rows`, at the top so that they are found at once.
    """
    figures = {**old.get("sections", {}), **{n: s.figures for n, s in sections.items()}}
    rows = old.get("rows", [])
    if "rows" in sections:
        rows = figures.pop("rows")["rows"]
    checks = [c for c in old.get("checks", []) if c["section"] not in sections]
    checks += [{"section": n, **asdict(c)} for n, s in sections.items() for c in s.checks]
    return {
        **about,
        "rows": rows,
        "checks": sorted(checks, key=lambda c: c["point"]),
        "sections": figures,
    }


def check_table(checks: Iterable[Mapping[str, Any]]) -> Table:
    """All checks, the failed ones marked."""
    table = Table(title="Checks", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("point", "what", "value", "bar", ""):
        right = name == "value"
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "what")
    for check in checks:
        value = check["value"]
        shown = "not measured" if value is None or math.isnan(value) else f"{value:.3g}"
        verdict = "[green]ok[/]" if check["ok"] else "[red]failed[/]"
        table.add_row(str(check["point"]), check["what"], shown, check["bar"], verdict)
    return table


def failed(checks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [c for c in checks if not c["ok"]]


def check(
    what: str, value: float, *, most: float | None = None, least: float | None = None
) -> dict[str, Any]:
    """A check of a benchmark whose claims have no numbers, as it is written down."""
    ok = (most is None or value <= most) and (least is None or value >= least)
    bar = f"<= {most:g}" if most is not None else f">= {least:g}"
    return {"what": what, "value": value, "bar": bar, "ok": ok}


def conclude(checks: Sequence[Mapping[str, Any]], console: Console) -> int:
    """Say which checks hold, a line each; returns the exit status."""
    for found in checks:
        verdict = "ok " if found["ok"] else "NOT"
        line = f"{verdict} {found['what']}: {found['value']} {found['bar']}"
        console.print(line, markup=False, soft_wrap=True)
    return int(bool(failed(checks)))

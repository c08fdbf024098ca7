"""Trials as rows, rows of earlier runs beside them, and what all of them have to show. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np

from benchmark.checks import Check, at_least, at_most
from benchmark.faults.cells import Cause, Cell, Phase, Target, matrix
from benchmark.faults.trial import Trial, lost_numbers
from benchmark.faults.verdicts import (
    LOST,
    OK,
    REPEATED,
    WRONG,
    Answer,
    counts,
    first_difference,
    in_flight,
    waits,
)

KUNSERVE, UPSTREAM = "kunserve", "upstream"
DETECTED_PROCESS_S = 2.0
DETECTED_HOST_S = 5.0
REQUESTS = 48

_LONG_S = 60.0
"""A cluster that is not well by then was kept from it by something."""

Row = dict[str, Any]


def about(system: str, cell: Cell) -> Row:
    """Which cell a row is of."""
    return {
        "system": system,
        "target": cell.target,
        "cause": cell.cause,
        "phase": cell.phase,
        "seed": cell.seed,
    }


def row_of(trial: Trial, expected: Sequence[Sequence[object]]) -> Row:
    """One cell; times in seconds."""
    row: Row = about(KUNSERVE, trial.cell) | {"point": trial.point}
    if trial.why_not:
        return row | {"why_not": trial.why_not}
    flying = in_flight(trial.answers, trial.struck)
    if not flying:
        return row | {"why_not": "all answers were there before the fault"}
    verdicts = counts(trial.answers, expected)
    found = waits(trial.answers, trial.struck)
    row |= {
        "requests": len(trial.answers),
        "in_flight": flying,
        **{name: verdicts[name] for name in (OK, LOST, WRONG, REPEATED)},
        "asked_again": sum(a.asked > 1 for a in trial.answers),
        "interrupted": len(found),
        "resumed_elsewhere": round(trial.resumed),
        "waits_s": [round(w, 3) for w in sorted(found)],
        "detected_s": _rounded(detected_s(trial)),
        "taken_for_dead": taken_for_dead(trial),
        "well_s": _rounded(trial.well_s),
        "tracebacks": trial.said.count("Traceback"),
    }
    if trial.unwell:
        row["unwell"] = trial.unwell
    if parted := _parted(trial.answers, expected):
        row["parted"] = parted
    if repeats := [[n, *r] for n, a in enumerate(trial.answers) for r in a.repeats]:
        row["repeats"] = repeats[:5]
    errors = sorted({a.error for a in trial.answers if a.error})
    return row | ({"errors": errors[:5]} if errors else {})


def failed(row: Row) -> bool:
    """Whether a client or the cluster has suffered by it."""
    return "why_not" not in row and (
        row["ok"] < row["requests"] or row["well_s"] is None or row["well_s"] > _LONG_S
    )


def _parted(answers: Sequence[Answer], expected: Sequence[Sequence[object]]) -> list[list[int]]:
    """Whole answers that are not as expected: number of the request, and where it parts."""
    both = enumerate(zip(answers, expected, strict=True))
    found = ((n, first_difference(a, e)) for n, (a, e) in both if a.whole)
    return [[n, at] for n, at in found if at is not None][:5]


def detected_s(trial: Trial) -> float | None:
    """From the fault until the router took a victim for lost, or until there was a next router."""
    if trial.cell.target is Target.ROUTER:
        if trial.cell.cause.is_cut:
            return trial.watch.first(
                trial.struck, lambda seen: bool(lost_numbers(seen, trial.before))
            )
        first = trial.routers[0][1]
        later = (at for at, pid in trial.routers if at >= trial.struck and pid not in (0, first))
        return next((at - trial.struck for at in later), None)
    victims = set(trial.victims)
    return trial.watch.first(
        trial.struck, lambda seen: bool(victims & lost_numbers(seen, trial.before))
    )


def taken_for_dead(trial: Trial) -> bool:
    """Whether anybody was, be it rightly or not."""
    if trial.cell.target is Target.ROUTER and not trial.cell.cause.is_cut:
        return detected_s(trial) is not None
    return any(
        lost_numbers(seen, trial.before) for seen in trial.watch.seen if seen.at >= trial.struck
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


# -- rows of several runs ------------------------------------------------------------------------


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(k) for k in ("system", "target", "cause", "phase", "seed"))


def merged(old: Iterable[Row], new: Iterable[Row], marks: Mapping[str, Any]) -> list[Row]:
    """New rows in place of old ones of the same cell; those of another run keep its marks.

    `marks` are those of this run, such as its revision. A row that was not brought about does
    not take the place of one that was.
    """
    rows = {identity(row): row for row in old}
    for row in new:
        known = rows.get(identity(row))
        if known is None or "why_not" in known or "why_not" not in row:
            rows[identity(row)] = {**row, **marks}
    order = {cell.key: n for n, cell in enumerate(matrix(seeds=range(100)))}
    last = len(order)
    return sorted(
        rows.values(),
        key=lambda r: (
            r["system"] != KUNSERVE,
            order.get((r["target"], r["cause"], r["phase"], r["seed"]), last),
        ),
    )


# -- what they show ------------------------------------------------------------------------------


def recovery(rows: Sequence[Row], reload_s: float, prefill_s: float) -> list[Row]:
    """By cause: how long interrupted streams waited for their next token."""
    found = []
    for cause in Cause:
        of_cause = [r for r in rows if r["cause"] == cause and r["system"] == KUNSERVE]
        all_waits = [w for r in of_cause for w in r.get("waits_s", ())]
        if not all_waits:
            continue
        p50, p99 = (float(np.percentile(all_waits, p)) for p in (50, 99))
        found.append(
            {
                "cause": cause,
                "streams": len(all_waits),
                "p50_s": round(p50, 3),
                "p99_s": round(p99, 3),
                "p50_reloads": round(p50 / reload_s, 2),
                "p99_reloads": round(p99 / reload_s, 2),
                "p50_prefills": round(p50 / prefill_s, 1),
                "p99_prefills": round(p99 / prefill_s, 1),
            }
        )
    return found


def checks(rows: Sequence[Row]) -> list[Check]:
    """What has to hold, of what was run."""
    ours = [r for r in rows if r["system"] == KUNSERVE]
    run = [r for r in ours if "why_not" not in r]
    cells = {(c.target, c.cause, c.phase) for c in matrix()}
    seen = {(r["target"], r["cause"], r["phase"]) for r in run}
    found = [
        at_least(1, f"cells of the matrix that were run, of {len(cells)}", len(seen & cells), 1),
        at_most(1, "trials that could not be brought about", len(ours) - len(run), 0),
        at_least(1, "requests of each trial", min((r["requests"] for r in run), default=0), 48),
    ]
    for name in (LOST, WRONG, REPEATED):
        what = {LOST: "requests lost", WRONG: "requests with wrong tokens"}.get(
            name, "requests with repeated tokens"
        )
        found.append(at_most(1, what, sum(r[name] for r in run), 0))
    found += [
        at_most(1, "trials after which the cluster was not as before", _unwell(run), 0),
        at_most(1, "tracebacks", sum(r["tracebacks"] for r in run), 0),
        at_most(1, "SIGSTOP of 5 s that was taken for a death", _mistaken(run), 0),
        at_most(2, "detection of a dead process, s", _slowest(run, _is_process), 2.0),
        at_most(2, "detection of a dead host, s", _slowest(run, _is_host), DETECTED_HOST_S),
    ]
    return found


def _unwell(run: Iterable[Row]) -> int:
    return sum(r["well_s"] is None for r in run)


def _mistaken(run: Iterable[Row]) -> float:
    """NaN if none was run."""
    found = [r["taken_for_dead"] for r in run if r["cause"] == Cause.PAUSE]
    return sum(found) if found else float("nan")


def _slowest(rows: Iterable[Row], which: Any) -> float:
    """NaN if one was never detected, or none was run."""
    found = [r["detected_s"] for r in rows if which(r)]
    if not found or None in found:
        return float("nan")
    return float(max(found))


def _is_process(row: Row) -> bool:
    return bool(row["cause"] == Cause.KILL) and row["target"] != Target.HOST


def _is_host(row: Row) -> bool:
    without_power = row["cause"] == Cause.KILL and row["target"] == Target.HOST
    return bool(without_power) or Cause(row["cause"]).is_cut


def beside_upstream(rows: Sequence[Row]) -> list[Row]:
    """By target and cause: requests lost by each, of how many, where both were run."""
    found = []
    for target in Target:
        for cause in Cause:
            line: Row = {"target": target, "cause": cause}
            for system in (KUNSERVE, UPSTREAM):
                same = [
                    r
                    for r in rows
                    if (r["system"], r["target"], r["cause"]) == (system, target, cause)
                    and "why_not" not in r
                    and r["phase"] == Phase.INDEPENDENT
                ]
                if same:
                    bad = sum(r[name] for r in same for name in (LOST, WRONG, REPEATED))
                    line[system] = {"failed": bad, "requests": sum(r["requests"] for r in same)}
            if UPSTREAM in line:
                found.append(line)
    return found


class Rerun(StrEnum):
    """Which cells are run again that there are rows of."""

    NEVER = "never"
    CHANGED = "changed"
    """Those of another revision."""

    ALWAYS = "always"


def selected_cells(
    cells: Iterable[Cell], rows: Iterable[Row], revision: str, rerun: Rerun
) -> list[Cell]:
    """Those that are to be run now."""
    known = {
        identity(r)
        for r in rows
        if "why_not" not in r and (rerun is Rerun.NEVER or r.get("revision") == revision)
    }
    if rerun is Rerun.ALWAYS:
        known = set()
    return [c for c in cells if (KUNSERVE, *c.key) not in known]

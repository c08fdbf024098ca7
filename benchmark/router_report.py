"""What comes of measuring routers: rows, one a target, and what they are held against."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.checks import check
from benchmark.router_load import Tally

_SHARE = 0.7
"""Of what SGLang's router, which is compiled, does on one core."""

_SLOWER = 0.95
"""Of what the version before does in a second of CPU time."""

DIRECT, OURS, THEIRS, BEFORE = "direct", "kunserve", "sglang-router", "before"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of load: `streams` clients at once."""

    what: str
    streams: int


def figures(tally: Tally, took: float, router_cpu: float, load_cpu: float) -> Row:
    """One measurement of `took` seconds, with the CPU seconds of both sides."""
    found: Row = {
        "requests_per_s": tally.answers / took,
        "chunks_per_s": tally.chunks / took,
        "router_busy": router_cpu / took,
        "load_busy": load_cpu / took,
    }
    if tally.ttft:
        found |= {f"ttft_p{p}_ms": 1e3 * quantile(tally.ttft, p / 100) for p in (50, 99)}
    if router_cpu:
        found["requests_per_cpu_s"] = tally.answers / router_cpu
        found["chunks_per_cpu_s"] = tally.chunks / router_cpu
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """By nearest rank: a time that some answer really took."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def rows_of(case: Case, rounds: Sequence[dict[str, Row]]) -> list[Row]:
    """One row a target: medians of the rounds.

    What is added is against direct, and the share of the version before against that, round by
    round: what else runs on the machine comes and goes.
    """
    rows = []
    for target in rounds[0]:
        samples = [dict(r[target]) for r in rounds]
        for sample, r in zip(samples, rounds, strict=True):
            if target != DIRECT:
                for key in ("ttft_p50_ms", "ttft_p99_ms"):
                    if key in sample and key in r[DIRECT]:
                        sample[f"added_{key}"] = sample[key] - r[DIRECT][key]
            if target == OURS and BEFORE in r:
                for key in ("requests_per_cpu_s", "chunks_per_cpu_s"):
                    if key in sample and r[BEFORE].get(key):
                        sample[f"{key}_to_before"] = sample[key] / r[BEFORE][key]
        # A short round may lack a figure: nobody was answered, or no CPU time was seen to pass.
        keys = dict.fromkeys(key for sample in samples for key in sample)
        medians = {key: statistics.median(s[key] for s in samples if key in s) for key in keys}
        rows.append(
            {"what": case.what, "streams": case.streams, "through": target}
            | {key: round(value, 3 if value < 100 else 0) for key, value in medians.items()}
        )
    return rows


def no_slower(rows: Sequence[Row]) -> list[Row]:
    return [
        check(
            f"{what} a second of CPU time, against the version before",
            next(
                r[f"{what}_per_cpu_s_to_before"]
                for r in rows
                if (r["what"], r["through"]) == (what, OURS)
            ),
            least=_SLOWER,
        )
        for what in ("chunks", "requests")
    ]


def all_checks(rows: Sequence[Row]) -> list[Row]:
    found = {(r["what"], r["streams"], r["through"]): r for r in rows}

    def ratio(what: str, key: str) -> float:
        ours, theirs = (
            next(r[key] for r in rows if (r["what"], r["through"]) == (what, through))
            for through in (OURS, THEIRS)
        )
        return float(round(ours / theirs, 3))

    return [
        *(
            check(
                f"{what} a second {how}, against {THEIRS}",
                ratio(what, f"{what}_{key}"),
                least=_SHARE,
            )
            for what in ("chunks", "requests")
            for how, key in (("of CPU time", "per_cpu_s"), ("in a closed loop", "per_s"))
        ),
        check(
            "P99 of the TTFT added at 32 streams, ms",
            found["ttft", 32, OURS]["added_ttft_p99_ms"],
            most=5,
        ),
    ]

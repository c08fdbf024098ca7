"""What came of it as rows and checks. Pure."""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmark.checks import check
from benchmark.endurance.census import Census, Life
from benchmark.endurance.crowd import Crowd
from benchmark.endurance.flatness import Slope, slope
from benchmark.endurance.soak import Story
from benchmark.endurance.throughput import Pair
from benchmark.faults.cells import Transition
from benchmark.faults.verdicts import LOST, REPEATED, WRONG
from benchmark.report import describe_machine
from kunserve_sglang.policy.transition_request import Outcome

MOST_GROWTH = 0.1
"""Of its mean, in the time of a run: what memory may surely grow by. Some of what is kept is
bounded by count, and is not full in minutes; a longer run asks for more."""

MOST_MORE = 1.0
"""The same of what is counted in pieces."""

LEAST_THROUGHPUT = 0.95


def results(
    story: Story,
    crowd: Crowd,
    census: Census,
    pairs: Sequence[Pair],
    tracebacks: int,
    load_before: Sequence[float],
    flags: argparse.Namespace,
) -> dict[str, Any]:
    """All that is written down."""
    slopes = slopes_of(census.samples, lambda began: warm_at(story, began, flags.warm_s))
    by_clock, by_cpu = (median(p.worn[i] / p.fresh[i] for p in pairs) for i in range(2))
    counted = {
        "requests lost": crowd.verdicts[LOST],
        "requests with wrong tokens": crowd.verdicts[WRONG],
        "requests with repeated tokens": crowd.verdicts[REPEATED],
        "times that the books did not balance": len(story.imbalances),
        "things that were left over at the end": len(story.leftovers),
        "tracebacks": tracebacks,
    }
    return {
        "command": f"python -m benchmark.endurance --minutes {flags.minutes:g} --seed {flags.seed}",
        "machine": describe_machine(),
        "load_average": [round(load, 1) for load in load_before],
        "requests": dict(crowd.verdicts),
        "errors": crowd.errors,
        "happened": _counted(story),
        "slowest_return_s": round(story.slowest_return_s, 1),
        "looks": story.looks,
        "imbalances": story.imbalances,
        "leftovers": story.leftovers,
        "throughput": {"worn": [p.worn for p in pairs], "fresh": [p.fresh for p in pairs]},
        "checks": [
            *(check(what, value, most=0) for what, value in counted.items()),
            *(_flat(*of, found, flags.minutes / 60) for of, found in slopes.items()),
            check(
                "tokens a second of CPU time, at the end against a fresh cluster's",
                round(by_cpu, 3),
                least=LEAST_THROUGHPUT,
            ),
            check(
                "tokens a second, at the end against a fresh cluster's",
                round(by_clock, 3),
                least=LEAST_THROUGHPUT,
            ),
        ],
        "rows": [_row(role, measure, found) for (role, measure), found in slopes.items()],
    }


def slopes_of(
    samples: Mapping[str, Mapping[Life, Sequence[tuple[float, float]]]],
    warm_at: Callable[[float], float],
) -> dict[tuple[str, str], Slope]:
    """By role and measure, as far as there is enough to tell."""
    found = {}
    for measure, lives in samples.items():
        roles: dict[str, dict[Life, Sequence[tuple[float, float]]]] = defaultdict(dict)
        for life, values in lives.items():
            roles[life.role][life] = values
        for role, own in roles.items():
            if (grows := slope(own, warm_at)) is not None:
                found[role, measure] = grows
    return found


def warm_at(story: Story, began: float, warm_s: float) -> float:
    """When a process has done everything once that begins at this time.

    It has been in a group, and left it: there it opens what instances talk to each other by.
    """
    at = began
    for wanted in (Transition.DROP, Transition.RESTORE):
        times = (t for t, kind, what in story.done if (kind, what) == (wanted, Outcome.COMMITTED))
        at = next((t for t in times if t > at), math.inf)
    return max(at, began + warm_s)


def _flat(role: str, measure: str, found: Slope, hours: float) -> dict[str, Any]:
    grown = found.surely * hours
    if measure.endswith("_mib"):
        share = grown / found.mean if found.mean else 0.0
        what = f"{role}: {measure.removesuffix('_mib')} memory surely grows by this part"
        return check(what, round(share, 4), most=MOST_GROWTH)
    return check(f"{role}: {measure}, surely more", round(grown, 2), most=MOST_MORE)


def _row(role: str, measure: str, found: Slope) -> dict[str, Any]:
    return {
        "role": role,
        "measure": measure,
        "mean": round(found.mean, 2),
        "per_hour": round(found.per_hour, 3),
        "error": round(found.error, 3),
        "lives": found.lives,
        "blocks": found.blocks,
    }


def _counted(story: Story) -> dict[str, int]:
    """How often each came, by what came of it where that is a word."""
    return dict(
        Counter(
            f"{kind}: {what}" if what[0].isalpha() else str(kind) for _, kind, what in story.done
        )
    )

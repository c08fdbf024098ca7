"""The planner alone: how long it takes for large clusters, and how good its plans are for small.

`python -m benchmark.planner` starts nothing and needs no model. It writes `planner.json` with
`rows` (one a measurement) and `checks` (each with its bar), and a picture of the growth. Times are
CPU time of the planning thread, medians of repeats, since other programs do not enter into that;
wall time stands beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from benchmark.checks import check, conclude
from benchmark.growth import draw_growth
from benchmark.made_up import carried_out, instance, memory, with_demand
from benchmark.program import ROOT, flags_of, run_program
from benchmark.report import describe_machine
from kunserve_sglang.core.cuts import best_cut
from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.monitor import OverloadMonitor
from kunserve_sglang.policy.planner import NoPlan, Plan, plan_drop, plan_restore
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.thresholds import Thresholds
from kunserve_sglang.policy.transition_request import DropRequest, RestoreRequest
from kunserve_sglang.testing.exhaustive_planner import every_outcome, stages_of

SIZES = (100, 1_000, 10_000, 100_000)
LARGEST = 8
Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    flags = flags_of("planner", "Time and quality of drop plans.")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    flags.add_argument("--repeats", type=int, default=7, help="of each measurement; median counts")
    flags.add_argument("--seed", type=int, default=1)
    return flags


def main() -> NoReturn:
    """Exit status 0 if every check holds."""
    flags = parser().parse_args()
    run_program("planner", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    chance = random.Random(flags.seed)
    load_before = os.getloadavg()
    rows = growth(flags.repeats, chance)
    quality = [against_all(chance, **case) for case in QUALITY]
    noise = [settle(level, chance) for level in (0.3, 0.5, 0.7, 0.94, 1.2)]
    checks = [*speed_checks(rows), *quality_checks(quality), *noise_checks(noise)]
    results = {
        "command": "python -m benchmark.planner",
        "machine": describe_machine(),
        "repeats": flags.repeats,
        "load_average": [round(load, 1) for load in load_before],
        "rows": [*rows, *quality, *noise],
        "checks": checks,
    }
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "planner.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_growth(rows, flags.output / "planner.png")
    return conclude(checks, console)


# --- how long -----------------------------------------------------------------------------------


def growth(repeats: int, chance: random.Random) -> list[Row]:
    """Milliseconds by the number of instances, for clusters of one and of four budgets."""
    rows = []
    for budgets in (1, 4):
        for size in SIZES:
            # Equal profiles are objects of their own, as they are when instances report them.
            state = ClusterState(
                instances=tuple(
                    instance(i, memory(30, 210 + 40 * (i % budgets)), chance.uniform(0.5, 1.8))
                    for i in range(size)
                )
            )
            tenth = state.capacity // 10
            dropped = with_demand(carried_out(state, drop(state, tenth)), 0.2)
            measurements: list[tuple[str, str, ClusterState, Callable[[ClusterState], object]]] = [
                ("drop", "a tenth more", state, partial(drop, tokens=tenth)),
                ("drop", "all there is", state, partial(drop, tokens=1 << 60)),
                ("restore", "all", dropped, partial(plan_restore, epoch=2, reason="")),
                ("observe", "", state, partial(OverloadMonitor(Thresholds()).observe, 0.0)),
            ]
            for what, asked, snapshot, run in measurements:
                times = [timed(snapshot, run) for _ in range(repeats)]
                rows.append(row(what, asked, size, budgets, times))
    return rows


def drop(state: ClusterState, tokens: int | None) -> Plan:
    return plan_drop(state, epoch=1, reason="", max_group_size=LARGEST, tokens=tokens)


def timed(state: ClusterState, run: Callable[[ClusterState], object]) -> tuple[float, float]:
    """CPU and wall milliseconds on a fresh snapshot, as the router makes one for each look."""
    snapshot = ClusterState(instances=state.instances)
    best_cut.cache_clear()  # every repeat is a first plan: none finds the cuts of the one before
    cpu, wall = time.thread_time(), time.perf_counter()
    run(snapshot)
    return 1e3 * (time.thread_time() - cpu), 1e3 * (time.perf_counter() - wall)


def row(
    what: str, asked: str, size: int, budgets: int, times: Sequence[tuple[float, float]]
) -> Row:
    cpu, wall = ([t[i] for t in times] for i in (0, 1))
    return {
        "what": what,
        "asked": asked,
        "instances": size,
        "budgets": budgets,
        "median_ms": round(statistics.median(cpu), 3),
        "least_ms": round(min(cpu), 3),
        "most_ms": round(max(cpu), 3),
        "median_wall_ms": round(statistics.median(wall), 3),
    }


def speed_checks(rows: Sequence[Row]) -> list[Row]:
    checks = []
    for budgets in (1, 4):
        for asked in ("a tenth more", "all there is"):
            times = {
                r["instances"]: r["median_ms"]
                for r in rows
                if (r["what"], r["asked"], r["budgets"]) == ("drop", asked, budgets)
            }
            name = f"{budgets} budget{'s' * (budgets > 1)}, {asked}"
            checks.append(
                check(f"10,000 instances planned, CPU ms ({name})", times[10_000], most=100)
            )
            decades = math.log10(SIZES[-1] / SIZES[0])
            exponent = math.log10(times[SIZES[-1]] / times[SIZES[0]]) / decades
            checks.append(
                check(f"exponent of growth, 10^2 to 10^5 ({name})", round(exponent, 2), most=1.25)
            )
    return checks


# --- how good -----------------------------------------------------------------------------------

QUALITY: tuple[dict[str, Any], ...] = (
    {"name": "alike, layers divide evenly", "cases": 120, "layers": (840,), "mixed": False},
    {"name": "real layer counts, merged before", "cases": 200, "layers": (), "mixed": False},
    {
        "name": "real layer counts, merged before, two budgets",
        "cases": 200,
        "layers": (),
        "mixed": True,
    },
)
REAL_LAYERS = (24, 28, 30, 32, 36, 40, 48, 64, 80)


def against_all(
    chance: random.Random, *, name: str, cases: int, layers: Sequence[int], mixed: bool
) -> Row:
    """Random small clusters and demands: how often no other plan that frees enough is shorter."""
    counts = {"equal": 0, "longer": 0, "short": 0}
    extra = []
    done = 0
    while done < cases:
        state, even = _small(chance, layers, mixed)
        outcomes = every_outcome(state, LARGEST)
        most = max(o.gained for o in outcomes)
        if most <= 0:
            continue
        done += 1
        if even:
            copy = (p := drop(state, 1)).capacity_after - p.capacity_before
            tokens = min(most, int((chance.randint(1, len(state.instances)) - 0.5) * copy))
        else:
            tokens = chance.randint(1, most)
        plan = drop(state, tokens)
        best = min(o.stages for o in outcomes if o.gained >= tokens)
        found = stages_of(carried_out(state, plan).groups(), plan.transition.after)
        if plan.capacity_after - plan.capacity_before < tokens:
            counts["short"] += 1
        elif found == best:
            counts["equal"] += 1
        else:
            counts["longer"] += 1
            extra.append(found.passed / best.passed - 1)
    return {
        "what": "against all partitions",
        "asked": name,
        "cases": cases,
        **counts,
        "extra_stages": round(statistics.mean(extra), 3) if extra else 0.0,
    }


def _small(chance: random.Random, layers: Sequence[int], mixed: bool) -> tuple[ClusterState, bool]:
    """Up to 8 instances; whether a merge frees exactly a copy."""
    size = chance.randint(2, 8)
    if layers:
        kinds = [memory(layers[0], 1600, 1000)]
    else:
        count = chance.choice(REAL_LAYERS)
        kinds = [memory(count, 160), memory(count, chance.choice((130, 220, 300)))]
        kinds = kinds if mixed else kinds[:1]
    state = ClusterState(
        instances=tuple(instance(i, chance.choice(kinds), 1.5) for i in range(size))
    )
    for _ in range(0 if layers else chance.randint(0, 2)):
        if len(state.groups()) > 2:
            state = carried_out(state, drop(state, 1))
    return state, bool(layers)


def quality_checks(rows: Sequence[Row]) -> list[Row]:
    bars = (1.0, 0.9, 0.9)
    return [
        check(
            f"plans with the fewest stages that free enough, N up to 8 ({r['asked']})",
            round(r["equal"] / r["cases"], 3),
            least=bar,
        )
        for r, bar in zip(rows, bars, strict=True)
    ]


# --- how calm -----------------------------------------------------------------------------------


def settle(level: float, chance: random.Random, seconds: int = 600) -> Row:
    """Ten minutes of demand that is noise about a level: how many transitions there are."""
    monitor = OverloadMonitor(Thresholds())
    state = ClusterState(instances=tuple(instance(i, memory(30, 210), level) for i in range(8)))
    done = {TransitionKind.DROP: 0, TransitionKind.RESTORE: 0}
    for tick in range(5 * seconds):
        share = level * max(0.0, chance.gauss(1, 0.15))
        state = with_demand(state, share)
        need = monitor.observe(tick / 5, state)
        if need is None:
            continue
        try:
            if isinstance(need, DropRequest):
                plan = drop(state, need.tokens)
            elif isinstance(need, RestoreRequest):
                plan = plan_restore(
                    state, epoch=1, reason="", instances=need.instances, stages=need.stages
                )
            else:
                continue
        except NoPlan:
            continue
        state = carried_out(state, plan)
        kind = plan.transition.kind
        monitor.transition_ended(tick / 5, kind)
        done[kind] += 1
    return {
        "what": "noisy demand",
        "asked": f"{level:.0%} of the capacity, noise 15 %",
        "seconds": seconds,
        "drops": done[TransitionKind.DROP],
        "restores": done[TransitionKind.RESTORE],
    }


def noise_checks(rows: Sequence[Row]) -> list[Row]:
    return [
        check(f"transitions in ten minutes ({r['asked']})", r["drops"] + r["restores"], most=10)
        for r in rows
    ]


if __name__ == "__main__":
    main()

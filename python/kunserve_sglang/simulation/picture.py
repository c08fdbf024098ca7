"""A sweep as a picture: latency over instances, or one comparison over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.simulation.outcome import Outcome
from kunserve_sglang.simulation.report import Slo, counted

_COLOURS = {"none": "#c1571b", "drop": "#1f6fb2"}
_NAMES = {"none": "none: requests queue", "drop": "drop: parameters are dropped"}
_DOTS = 8000
"""More requests than this are thinned out evenly: the picture would only get slower."""


def draw(outcomes: Sequence[Outcome], slo: Slo | None, path: Path) -> None:
    """Write a PNG: one number of instances over time and, for a sweep, TTFT over instances.

    Over time, the number with the most drops says most; without any, the smallest.
    """
    telling = max(outcomes, key=lambda o: (len(o.committed(TransitionKind.DROP)), -o.instances))
    shown = [o for o in outcomes if o.instances == telling.instances]
    sweep = len({o.instances for o in outcomes}) > 1
    rows = 5 if sweep else 4
    figure = plt.figure(figsize=(6.5 * max(2, len(shown)), 3 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, len(shown), height_ratios=[3, 3, 3, 1.2, 3][:rows])
    first: list[Any] = []
    for column, outcome in enumerate(shown):
        axes = [
            figure.add_subplot(
                grid[row, column],
                sharey=first[row] if first else None,
                sharex=first[0] if first else None,
            )
            for row in range(4)
        ]
        first = first or axes
        _over_time(axes, outcome, slo)
    first[0].set_ylabel("time to first token (s)")
    first[1].set_ylabel("requests")
    first[2].set_ylabel("KV token slots, all instances")
    first[3].set_ylabel("in groups")
    if sweep:
        _over_instances(figure.add_subplot(grid[4, :]), outcomes, slo)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _over_time(axes: Sequence[Any], outcome: Outcome, slo: Slo | None) -> None:
    ttft, requests, slots, groups = axes
    colour = _COLOURS[outcome.policy]
    times = [s.at_s for s in outcome.samples]
    jobs = [job for job in outcome.jobs if not job.failed]
    jobs = jobs[:: -(-len(jobs) // _DOTS)]
    ttft.scatter(
        [j.arrival for j in jobs], [j.ttft for j in jobs], s=4, color=colour, alpha=0.5, linewidth=0
    )
    ttft.set_yscale("log")
    ttft.set_title(
        f"{counted(outcome.instances)}, {_NAMES[outcome.policy]}", color=colour, fontweight="bold"
    )
    if slo is not None:
        ttft.axhline(slo.ttft_s, color="black", linewidth=0.8, linestyle="--")
    requests.plot(times, [s.running for s in outcome.samples], color=colour, label="running")
    requests.fill_between(
        times, [s.waiting for s in outcome.samples], color=colour, alpha=0.35, label="queued"
    )
    slots.fill_between(
        times, [s.slots_used for s in outcome.samples], color=colour, alpha=0.35, label="used"
    )
    slots.step(
        times,
        [s.slots_capacity for s in outcome.samples],
        where="post",
        color=colour,
        label="capacity",
    )
    groups.fill_between(
        times, [s.cooperative for s in outcome.samples], step="post", color="#3aa675"
    )
    groups.set_ylim(0, outcome.instances)
    groups.set_xlabel("seconds")
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (requests, slots):
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper right", ncols=2, frameon=False)


def _over_instances(axis: Any, outcomes: Sequence[Outcome], slo: Slo | None) -> None:
    for policy in dict.fromkeys(o.policy for o in outcomes):
        mine = sorted((o for o in outcomes if o.policy == policy), key=lambda o: o.instances)
        for percentile, style in ((50, ":"), (99, "-")):
            axis.plot(
                [o.instances for o in mine],
                [np.percentile([j.ttft for j in o.jobs if not j.failed], percentile) for o in mine],
                style,
                marker="o",
                color=_COLOURS[policy],
                label=f"{policy}, P{percentile}",
            )
    if slo is not None:
        axis.axhline(slo.ttft_s, color="black", linewidth=0.8, linestyle="--", label="SLO")
    axis.set_yscale("log")
    axis.set_xticks(sorted({o.instances for o in outcomes}))
    axis.set_xlabel("instances")
    axis.set_ylabel("time to first token (s)")
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=5)

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
from kunserve_sglang.simulation.report import Slo, counted
from kunserve_sglang.simulation.result import SimulationResult

_COLOURS = {"none": "#c1571b", "drop": "#1f6fb2"}
_NAMES = {"none": "none: requests queue", "drop": "drop: parameters are dropped"}
_DOTS = 8000
"""More requests than this are thinned out evenly: the picture would only get slower."""


def draw(results: Sequence[SimulationResult], slo: Slo | None, path: Path) -> None:
    """Write a PNG: one number of instances over time and, for a sweep, TTFT over instances.

    Over time, the number with the most drops says most; without any, the smallest.
    """
    telling = max(results, key=lambda r: (len(r.committed(TransitionKind.DROP)), -r.instances))
    shown = [r for r in results if r.instances == telling.instances]
    sweep = len({r.instances for r in results}) > 1
    rows = 5 if sweep else 4
    figure = plt.figure(figsize=(6.5 * max(2, len(shown)), 3 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, len(shown), height_ratios=[3, 3, 3, 1.2, 3][:rows])
    first: list[Any] = []
    for column, result in enumerate(shown):
        axes = [
            figure.add_subplot(
                grid[row, column],
                sharey=first[row] if first else None,
                sharex=first[0] if first else None,
            )
            for row in range(4)
        ]
        first = first or axes
        _over_time(axes, result, slo)
    first[0].set_ylabel("time to first token (s)")
    first[1].set_ylabel("requests")
    first[2].set_ylabel("KV token slots, all instances")
    first[3].set_ylabel("in groups")
    if sweep:
        _over_instances(figure.add_subplot(grid[4, :]), results, slo)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _over_time(axes: Sequence[Any], result: SimulationResult, slo: Slo | None) -> None:
    ttft, requests, slots, groups = axes
    colour = _COLOURS[result.policy]
    times = [s.at_s for s in result.samples]
    jobs = [job for job in result.jobs if not job.failed]
    jobs = jobs[:: -(-len(jobs) // _DOTS)]
    ttft.scatter(
        [j.arrival for j in jobs], [j.ttft for j in jobs], s=4, color=colour, alpha=0.5, linewidth=0
    )
    ttft.set_yscale("log")
    ttft.set_title(
        f"{counted(result.instances)}, {_NAMES[result.policy]}", color=colour, fontweight="bold"
    )
    if slo is not None:
        ttft.axhline(slo.ttft_s, color="black", linewidth=0.8, linestyle="--")
    requests.plot(times, [s.running for s in result.samples], color=colour, label="running")
    requests.fill_between(
        times, [s.waiting for s in result.samples], color=colour, alpha=0.35, label="queued"
    )
    slots.fill_between(
        times, [s.slots_used for s in result.samples], color=colour, alpha=0.35, label="used"
    )
    slots.step(
        times,
        [s.slots_capacity for s in result.samples],
        where="post",
        color=colour,
        label="capacity",
    )
    groups.fill_between(
        times, [s.cooperative for s in result.samples], step="post", color="#3aa675"
    )
    groups.set_ylim(0, result.instances)
    groups.set_xlabel("seconds")
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (requests, slots):
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper right", ncols=2, frameon=False)


def _over_instances(axis: Any, results: Sequence[SimulationResult], slo: Slo | None) -> None:
    for policy in dict.fromkeys(r.policy for r in results):
        mine = sorted((r for r in results if r.policy == policy), key=lambda r: r.instances)
        for percentile, style in ((50, ":"), (99, "-")):
            axis.plot(
                [r.instances for r in mine],
                [np.percentile([j.ttft for j in r.jobs if not j.failed], percentile) for r in mine],
                style,
                marker="o",
                color=_COLOURS[policy],
                label=f"{policy}, P{percentile}",
            )
    if slo is not None:
        axis.axhline(slo.ttft_s, color="black", linewidth=0.8, linestyle="--", label="SLO")
    axis.set_yscale("log")
    axis.set_xticks(sorted({r.instances for r in results}))
    axis.set_xlabel("instances")
    axis.set_ylabel("time to first token (s)")
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=5)

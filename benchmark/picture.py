"""Both runs in one picture: a column each, on common axes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from benchmark.experiment import Run
from benchmark.report import Comparison
from benchmark.workload import Workload

BASELINE, KUNSERVE = "#c1571b", "#1f6fb2"
_BURST, _QUEUED_ALPHA = "#f2e6b8", 0.35
_MODES = {
    "independent": "#dfe3e8",
    "preparing": "#f0b429",
    "cooperative": "#3aa675",
    "restoring": "#8fd3b0",
    "dead": "#222222",
}
_ROWS = ("ttft", "requests", "slots", "mode")
_HEIGHTS = (3, 3, 3, 0.7)


def draw(comparison: Comparison, path: Path) -> None:
    """Write a PNG with time to first token, requests, slots and modes over time."""
    figure, axes = plt.subplots(
        len(_ROWS),
        2,
        figsize=(13, 10),
        sharex=True,
        sharey="row",
        height_ratios=_HEIGHTS,
        layout="constrained",
    )
    _column(axes[:, 0], comparison.baseline, comparison.workload, BASELINE)
    _column(axes[:, 1], comparison.kunserve, comparison.workload, KUNSERVE)
    axes[0, 0].set_title("baseline: requests queue", color=BASELINE, fontweight="bold")
    axes[0, 1].set_title("KunServe: parameters are dropped", color=KUNSERVE, fontweight="bold")
    axes[0, 0].set_ylabel("time to first token (s)")
    axes[1, 0].set_ylabel("requests")
    axes[2, 0].set_ylabel("KV token slots, all instances")
    axes[3, 0].set_ylabel("mode")
    axes[0, 0].set_yscale("log")
    for axis in (axes[1, 0], axes[2, 0]):
        axis.set_ylim(bottom=0, top=1.2 * axis.get_ylim()[1])  # room for the legend
    for axis in axes[-1]:
        axis.set_xlabel("seconds since the first request could arrive")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _column(axes: Any, run: Run, workload: Workload, colour: str) -> None:
    ttft, requests, slots, mode = axes
    times = [s.at_s for s in run.timeline.samples]
    done = [r for r in run.results if r.ok]
    ttft.scatter([r.sent_s for r in done], [r.ttft_s for r in done], s=16, color=colour)
    requests.plot(times, [s.running for s in run.timeline.samples], color=colour, label="running")
    requests.fill_between(
        times,
        [s.waiting for s in run.timeline.samples],
        color=colour,
        alpha=_QUEUED_ALPHA,
        label="queued",
        step="post",
    )
    slots.fill_between(
        times,
        [s.slots_used for s in run.timeline.samples],
        color=colour,
        alpha=_QUEUED_ALPHA,
        label="used",
    )
    slots.step(
        times,
        [s.slots_capacity for s in run.timeline.samples],
        where="post",
        color=colour,
        label="capacity",
    )
    _mode_bands(mode, run)
    for axis in (ttft, requests, slots):
        axis.axvspan(
            workload.burst_start_s, workload.burst_end_s, color=_BURST, zorder=0, label="burst"
        )
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (requests, slots):
        axis.legend(loc="upper right", ncols=3, frameon=False)


def _mode_bands(axis: Any, run: Run) -> None:
    """One bar an instance, coloured by what it was doing."""
    samples = run.timeline.samples
    count = len(samples[0].modes) if samples else 0
    for number in range(count):
        spans = _spans([(s.at_s, s.modes[number]) for s in samples if len(s.modes) == count])
        for mode, pieces in spans.items():
            axis.broken_barh(pieces, (number - 0.4, 0.8), color=_MODES[mode])
    seen = {mode for s in samples for mode in s.modes}
    handles = [Patch(color=colour, label=mode) for mode, colour in _MODES.items() if mode in seen]
    axis.set_yticks(range(count), [f"instance {i}" for i in range(count)])
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.7),
        ncols=len(_MODES),
        frameon=False,
    )


def _spans(modes: list[tuple[float, str]]) -> dict[str, list[tuple[float, float]]]:
    """Stretches of equal mode as (start, length), by mode."""
    changes = [
        (at_s, mode) for (_, last), (at_s, mode) in pairwise([(0.0, ""), *modes]) if mode != last
    ]
    ends = [at_s for at_s, _ in changes[1:]] + [at_s for at_s, _ in modes[-1:]]
    spans: dict[str, list[tuple[float, float]]] = {}
    for (start, mode), end in zip(changes, ends, strict=True):
        spans.setdefault(mode, []).append((start, end - start))
    return spans

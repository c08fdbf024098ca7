"""The ablation's rows as a table for people, and its runs as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from rich import box
from rich.table import Table

from benchmark.variants import Rows, queued_at

_PERCENTILES = {"p50": "P50", "p90": "P90", "p99": "P99", "p999": "P99.9"}
_COLOURS = ("#c1571b", "#e0a100", "#7a9e3f", "#3aa675", "#1f6fb2", "#8a8f98")
_STEP_S = 0.25


def row_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A column for each variant, so that it fits on a common terminal."""
    table = Table(
        title="The same window of a trace on the same memory (times in ms)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("")
    for row in rows:
        table.add_column(row["name"], justify="right", overflow="fold")
    for what in ("ttft", "tpot"):
        for which, label in _PERCENTILES.items():
            values = (_number(row[f"{what}_{which}_ms"]) for row in rows)
            table.add_row(f"{what.upper()} {label}", *values)
        table.add_section()
    for label, text in _FIGURES.items():
        table.add_row(label, *map(text, rows))
    table.caption = "Longest gap: between two tokens of a request; x: of that request's median gap."
    table.caption_justify = "left"
    return table


def draw(rows: Rows, figures: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG: who waited how long and when, how many queued, and the percentiles."""
    figure, axes = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
    _over_time(axes[0, 0], axes[1, 0], rows)
    _bars(axes[0, 1], figures, "ttft", "time to first token (s)")
    _bars(axes[1, 1], figures, "tpot", "time per output token (s)")
    axes[0, 1].set_yscale("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _over_time(ttft: Any, queue: Any, rows: Rows) -> None:
    for (name, run), colour in zip(rows.runs.items(), _COLOURS, strict=True):
        done = [r for r in run.results if r.ok]
        ttft.scatter(
            [r.sent_s for r in done], [r.ttft_s for r in done], s=12, color=colour, label=name
        )
        end = max((r.sent_s + r.ttft_s for r in done), default=0.0)
        times = np.arange(0.0, end + _STEP_S, _STEP_S)
        queue.plot(times, queued_at(run, times), color=colour, label=name)
    ttft.set_yscale("log")
    ttft.set_ylabel("time to first token (s)")
    queue.set_ylabel("requests without a first token")
    for axis in (ttft, queue):
        axis.set_xlabel("seconds since the run began")
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    ttft.legend(frameon=False, ncols=2)


def _bars(axis: Any, figures: Sequence[Mapping[str, Any]], what: str, label: str) -> None:
    width = 0.8 / len(figures)
    for i, (row, colour) in enumerate(zip(figures, _COLOURS, strict=True)):
        heights = [row[f"{what}_{w}_ms"] / 1e3 for w in _PERCENTILES]
        places = np.arange(len(_PERCENTILES)) + (i - (len(figures) - 1) / 2) * width
        axis.bar(places, heights, width, color=colour, label=row["name"])
    axis.set_xticks(range(len(_PERCENTILES)), list(_PERCENTILES.values()))
    axis.set_ylabel(label)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _share(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.1%}"


def _number(value: float | None) -> str:
    if value is None or np.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


_FIGURES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "tokens/s": lambda row: _number(row["output_throughput"]),
    "bubbles": lambda row: _share(row["bubble_fraction"]),
    "longest gap": lambda row: _number(row["stall_ms"]),
    "x median gap": lambda row: _number(row["stall_ratio"]),
    "slots before": lambda row: f"{row['capacity_before']:,}",
    "slots at most": lambda row: f"{row['capacity_peak']:,}",
    "failed": lambda row: str(row["failed"]),
    "drops": lambda row: str(row["drops"]),
    "restores": lambda row: str(row["restores"]),
}

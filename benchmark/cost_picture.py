"""Predicted over measured time, for the cost model and for one that knows tokens only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from benchmark.picture import BASELINE, KUNSERVE

_MARKERS = {"prefill": "o", "decode": "^"}
_BAND = 0.05


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write a PNG with one panel a model; the band is an error of 5 %."""
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 5.2), sharex=True, sharey=True, layout="constrained"
    )
    for axis, key, name, colour in (
        (axes[0], "tokens_only", "tokens only", BASELINE),
        (axes[1], "cost_model", "with attention", KUNSERVE),
    ):
        predicted = "predicted_ms" if key == "cost_model" else f"{key}_ms"
        _panel(axis, figures["rows"], predicted, colour)
        median = figures["summary"][key]["all"]["median"]
        axis.set_title(f"{name}: median error {median:.1%}", color=colour, fontweight="bold")
    axes[0].set_ylabel("predicted (ms a layer)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axis: Any, rows: list[dict[str, Any]], predicted: str, colour: str) -> None:
    for kind, marker in _MARKERS.items():
        chosen = [r for r in rows if r["kind"] == kind]
        axis.scatter(
            [r["measured_ms"] for r in chosen],
            [r[predicted] for r in chosen],
            s=26,
            marker=marker,
            color=colour,
            alpha=0.75,
            label=kind,
        )
    measured = [r["measured_ms"] for r in rows]
    ends = [0.8 * min(measured), 1.25 * max(measured)]
    axis.plot(ends, ends, color="black", linewidth=0.8)
    axis.fill_between(
        ends,
        [(1 - _BAND) * x for x in ends],
        [(1 + _BAND) * x for x in ends],
        color="black",
        alpha=0.12,
        linewidth=0,
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("measured (ms a layer)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", frameon=False)

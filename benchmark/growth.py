"""A picture of how time grows with the number of instances."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

_COLOURS = {
    ("drop", "a tenth more"): "#1f6fb2",
    ("drop", "all there is"): "#c1571b",
    ("restore", "all"): "#3aa675",
    ("observe", ""): "#777777",
}


def draw_growth(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: medians with the range of the repeats, both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for (what, asked), colour in _COLOURS.items():
        for budgets, line in ((1, "-"), (4, "--")):
            of_kind = [
                r for r in rows if (r["what"], r["asked"], r["budgets"]) == (what, asked, budgets)
            ]
            sizes = [r["instances"] for r in of_kind]
            medians = [r["median_ms"] for r in of_kind]
            below = [r["median_ms"] - r["least_ms"] for r in of_kind]
            above = [r["most_ms"] - r["median_ms"] for r in of_kind]
            label = f"{what} {asked}".strip() + (", four budgets" if budgets > 1 else "")
            axis.errorbar(
                sizes,
                medians,
                yerr=(below, above),
                color=colour,
                linestyle=line,
                marker="o",
                markersize=4,
                capsize=3,
                label=label,
            )
    axis.axhline(100, color="#aa3333", linewidth=0.8)
    axis.annotate("100 ms", (100, 110), color="#aa3333")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("instances")
    axis.set_ylabel("CPU milliseconds (median, range of repeats)")
    axis.set_title("Planning time by cluster size")
    axis.grid(visible=True, which="both", alpha=0.2)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)

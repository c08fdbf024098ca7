"""Simulated and measured TTFT as distributions, a panel a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from benchmark.picture import BASELINE, KUNSERVE


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG; each run has `measured_ttft_s` and `simulated_ttft_s`."""
    figure, axes = plt.subplots(
        1, len(runs), figsize=(4.2 * len(runs), 3.8), squeeze=False, layout="constrained"
    )
    for axis, run in zip(axes[0], runs, strict=True):
        for key, colour in (("measured", BASELINE), ("simulated", KUNSERVE)):
            values = np.sort(run[f"{key}_ttft_s"])
            axis.step(values, np.arange(1, len(values) + 1) / len(values), color=colour, label=key)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("time to first token (s)")
        axis.set_title(f"{run['instances']} instances, {run['policy']}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("share of requests")
    axes[0, 0].legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)

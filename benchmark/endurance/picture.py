"""Memory by role over the time of a run, with what happened."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from benchmark.endurance.census import MEASURES, Census
from benchmark.endurance.happenings import Happening
from benchmark.endurance.soak import Story

_ROLES = {
    "router": "#c1571b",
    "scheduler": "#3aa675",
    "server": "#5b7fa8",
    "detokenizer": "#9a7bb0",
}
_MARKS: dict[str, str] = {
    Happening.KILL_ROUTER: "#c1571b",
    Happening.KILL_INSTANCE: "#222222",
    Happening.RENEW: "#f0b429",
}


def draw(story: Story, census: Census, path: Path) -> None:
    """One panel a measure; a line is a process, a stroke at the top a death or a renewal."""
    figure, panels = plt.subplots(len(MEASURES), 1, figsize=(10, 9), sharex=True)
    for panel, measure in zip(panels, MEASURES, strict=True):
        for life, samples in census.samples[measure].items():
            if colour := _ROLES.get(life.role):
                times, values = zip(*samples, strict=True)
                panel.plot([t / 60 for t in times], values, color=colour, linewidth=0.9)
        panel.set_ylabel(measure.replace("_mib", " memory, MiB"))
        panel.set_ylim(bottom=0)
        for at, kind, _ in story.done:
            if kind in _MARKS:
                panel.axvline(at / 60, ymin=0.94, color=_MARKS[kind], linewidth=1.2)
    for role, colour in _ROLES.items():
        panels[0].plot([], [], color=colour, label=role)
    for kind, colour in _MARKS.items():
        panels[0].plot([], [], "|", color=colour, label=str(kind))
    panels[0].legend(loc="upper center", ncols=4, bbox_to_anchor=(0.5, 1.35), frameon=False)
    panels[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

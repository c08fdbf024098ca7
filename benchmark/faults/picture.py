"""Who served what, when, around each fault: a panel for each target and cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from benchmark.faults.cells import Cause, Target
from benchmark.faults.trial import Trial

_FROM_S, _BIN_S, _DIGITS = -2.0, 0.5, 2
_MODES = {
    "independent": "#9fb8d1",
    "preparing": "#f0b429",
    "cooperative": "#3aa675",
    "restoring": "#8fd3b0",
    "recovering": "#c1571b",
    "dead": "#222222",
    "unknown": "#ffffff",
}
_MOST_S = 40.0


def story(trial: Trial) -> dict[str, Any]:
    """What the picture is made of; times are seconds after the fault.

    `lanes` has, by instance, each change of its mode and of how many requests it runs (null where
    the router does not answer); `delivered` is tokens a second that reached the clients of streams,
    in steps of `step_s` from `from_s` on.
    """
    times = [
        at - trial.struck for answer in trial.answers for at in _times_of_tokens(answer.events)
    ]
    last = max([*times, 0.0])
    bins = [0] * (1 + int((last - _FROM_S) / _BIN_S))
    for at in times:
        if at >= _FROM_S:
            bins[int((at - _FROM_S) / _BIN_S)] += 1
    return {
        "victims": list(trial.victims),
        "lanes": _lanes(trial),
        "from_s": _FROM_S,
        "step_s": _BIN_S,
        "delivered": [n / _BIN_S for n in bins],
    }


def _times_of_tokens(events: Sequence[tuple[float, int]]) -> list[float]:
    times: list[float] = []
    for at, there in events:
        times += [at] * max(0, there - len(times))
    return times


def _lanes(trial: Trial) -> dict[str, list[list[Any]]]:
    lanes: dict[str, list[list[Any]]] = {}
    for seen in trial.watch.seen:
        at = round(seen.at - trial.struck, _DIGITS)
        if at < _FROM_S:
            continue
        known = seen.instances or {}
        for number in {*trial.before, *known}:
            instance = known.get(number)
            mode = "unknown" if instance is None else str(instance["mode"])
            running = None if instance is None else instance.get("running")
            lane = lanes.setdefault(str(number), [])
            if not lane or lane[-1][1:] != [mode, running]:
                lane.append([at, mode, running])
    return lanes


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of all rows with a story; nothing if there is none."""
    told = {(r["target"], r["cause"]): r for r in rows if "story" in r}
    if not told:
        return
    figure, axes = plt.subplots(
        len(Target), len(Cause), figsize=(22, 12), layout="constrained", squeeze=False
    )
    for across, cause in enumerate(Cause):
        for down, target in enumerate(Target):
            axis = axes[down][across]
            axis.set_title(f"{target}, {cause}", fontsize=10)
            row = told.get((target, cause))
            if row is None:
                axis.text(0.5, 0.5, "not run", ha="center", transform=axis.transAxes)
                axis.set_axis_off()
            else:
                _panel(axis, row)
    handles = [Patch(facecolor=c, edgecolor="#999999", label=m) for m, c in _MODES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(_MODES), frameon=False)
    figure.suptitle(
        "Three instances in a group, 24 streams and 24 plain requests: modes, running requests "
        "(number in the lane), and tokens a second that reach the streams (line); "
        "seconds after the fault"
    )
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _panel(axis: Any, row: Mapping[str, Any]) -> None:
    told = row["story"]
    lanes = told["lanes"]
    end = min(_MOST_S, max(2.0, told["from_s"] + told["step_s"] * len(told["delivered"])) + 1.0)
    for height, (_, lane) in enumerate(sorted(lanes.items(), key=lambda item: int(item[0]))):
        for (at, mode, running), after in zip(lane, [*lane[1:], [end]], strict=True):
            begin, until = max(at, told["from_s"]), min(after[0], end)
            if begin >= until:
                continue
            axis.broken_barh(
                [(begin, until - begin)], (height - 0.4, 0.8), facecolor=_MODES.get(mode, "#cccccc")
            )
            if running and mode != "dead" and until - begin > (end - told["from_s"]) / 14:
                axis.text((begin + until) / 2, height, str(running), ha="center", va="center")
    axis.axvline(0.0, color="#d62728", linewidth=1.2)
    names = [f"{n}{' *' if int(n) in told['victims'] else ''}" for n in sorted(lanes, key=int)]
    axis.set_yticks(range(len(lanes)), names)
    axis.set_ylim(-0.5, len(lanes) + 1.2)
    axis.set_xlim(told["from_s"], end)
    rates = axis.twinx()
    at = [told["from_s"] + told["step_s"] * n for n in range(len(told["delivered"]))]
    rates.step(at, told["delivered"], where="post", color="#1f6fb2")
    most = max([*told["delivered"], 1.0])
    rates.set_ylim(-2.2 * most, 1.1 * most)  # above the lanes
    rates.set_yticks([0, most])
    rates.tick_params(labelsize=7)
    found = f"{row['lost']} lost, {row['wrong']} wrong, {row['repeated']} repeated"
    axis.text(0.99, 0.97, found, ha="right", va="top", transform=axis.transAxes, fontsize=8)

"""The demo's second burst: computing is short and not memory, so it is best to drop nothing.

Long prompts with short answers: they leave their slots soon, and whatever is dropped, no more of
them are computed in a second.
"""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmark.experiment import Run
from benchmark.metrics import Slo, summarise
from benchmark.prompts import PromptSource
from benchmark.sizing import LONG_PROMPT, Sizes
from benchmark.workload import Workload, steady_and_burst

_MOST_LOST = 0.05
"""One request of the burst, or so."""


def workload(prompts: PromptSource, sizes: Sizes, seed: int) -> Workload:
    return steady_and_burst(
        prompts,
        steady_rate=0.0,
        steady=LONG_PROMPT,
        burst_requests=sizes.long_prompts,
        burst=LONG_PROMPT,
        before_s=0.0,
        burst_s=sizes.long_prompts_s,
        after_s=0.0,
        seed=seed,
    )


def promised(status: dict[str, Any]) -> Slo:
    """What a cluster that has this status promises by its defaults."""
    service = status["service"]
    return Slo(ttft_s=service["ttft_ms"] / 1e3, tpot_s=service["tpot_ms"] / 1e3)


def to_json(
    first: tuple[Run, Run], second: tuple[Run, Run], limits: Slo
) -> dict[str, dict[str, Any]]:
    """Figures of both bursts, each of the baseline's run and that with KunServe."""
    known = len(first[1].events)
    return {
        "memory is short": _figures(*first, limits, first[1].events),
        "computing is short": _figures(*second, limits, second[1].events[known:]),
    }


def _figures(
    baseline: Run, kunserve: Run, limits: Slo, events: list[dict[str, Any]]
) -> dict[str, Any]:
    drops = [e for e in events if e["kind"] == "drop"]
    carried_out = [e for e in drops if e["status"] == "committed"]
    told = next(iter(carried_out or drops), None)
    return {
        "baseline": summarise(baseline.results, limits),
        "kunserve": summarise(kunserve.results, limits),
        "drops": len(carried_out),
        "why": (told["error"] or told["reason"]) if told else "nothing asked for a drop",
        "events": events,
    }


def table(bursts: dict[str, dict[str, Any]]) -> RenderableType:
    """What was decided in each burst, and what came of it."""
    grid = Table(title="Never worse than without", title_justify="left")
    grid.add_column("burst")
    for name in ("dropped", "within limits", "P99 TTFT (s)", "P50 E2E (s)"):
        grid.add_column(name, justify="right")
    reasons = []
    for name, figures in bursts.items():
        sides = figures["baseline"], figures["kunserve"]
        shares = " -> ".join(f"{side['slo_attainment']:.0%}" for side in sides)
        times = (
            " -> ".join(f"{side[key] / 1e3:.1f}" for side in sides)
            for key in ("p99_ttft_ms", "median_e2e_latency_ms")
        )
        grid.add_row(name, "yes" if figures["drops"] else "no", shares, *times)
        reasons.append(f"{name}: {figures['why']}.")
    first = next(iter(bursts.values()))["kunserve"]
    limits = (first[f"slo_{what}_ms"] for what in ("ttft", "tpot"))
    promise = "Limits here are what the cluster promises: TTFT {:,.0f} ms, TPOT {:,.0f} ms."
    return Group(grid, Text("\n".join([*reasons, promise.format(*limits)])))


def is_worse(bursts: dict[str, dict[str, Any]]) -> bool:
    """Whether fewer kept the limits in the second burst than without KunServe."""
    sides = bursts["computing is short"]
    lost: float = sides["baseline"]["slo_attainment"] - sides["kunserve"]["slo_attainment"]
    return lost > _MOST_LOST

"""The figures of a run, under the keys of `sglang.bench_serving`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmark.client import RequestResult

PERCENTILES = {"p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request's user expects at most."""

    ttft_s: float
    tpot_s: float

    def met_by(self, result: RequestResult) -> bool:
        return result.ok and result.ttft_s <= self.ttft_s and result.tpot_s <= self.tpot_s


def slo_from(unloaded: Sequence[RequestResult], scale: float) -> Slo:
    """`scale` times the median of requests that had the cluster to themselves.

    A fixed number of seconds would say more about the machine than about the cluster.
    """
    done = [r for r in unloaded if r.ok]
    return Slo(
        ttft_s=scale * float(np.median([r.ttft_s for r in done])),
        tpot_s=scale * float(np.median([r.tpot_s for r in done])),
    )


def summarise(results: Sequence[RequestResult], slo: Slo) -> dict[str, float]:
    """Totals, rates over the time from the first request sent to the last answer, latencies.

    Latencies and tokens are those of the requests that succeeded. A failed request misses its SLO.
    Latencies are NaN if none succeeded, and the rates are 0 if nothing was sent.
    """
    done = [r for r in results if r.ok]
    duration = _duration_s(results)
    prompt_tokens = sum(r.prompt_len for r in done)
    output_tokens = sum(r.output_tokens for r in done)
    within = sum(slo.met_by(r) for r in results)

    def rate(count: float) -> float:
        return count / duration if duration else 0.0

    summary: dict[str, float] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(results) - len(done),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": rate(len(done)),
        "input_throughput": rate(prompt_tokens),
        "output_throughput": rate(output_tokens),
        "total_throughput": rate(prompt_tokens + output_tokens),
        "goodput": rate(within),
        "slo_attainment": within / len(results) if results else 0.0,
        "slo_ttft_ms": slo.ttft_s * 1e3,
        "slo_tpot_ms": slo.tpot_s * 1e3,
    }
    summary |= latency("ttft", [r.ttft_s for r in done])
    summary |= latency("tpot", [r.tpot_s for r in done if r.output_tokens > 1])
    summary |= latency("itl", [gap for r in done for gap in r.itl_s])
    summary |= latency("e2e_latency", [r.e2e_s for r in done])
    return summary


def latency(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median, deviation and percentiles in milliseconds, as `<which>_<name>_ms`."""
    values = np.asarray(seconds, dtype=np.float64) * 1e3
    empty = not len(values)
    figures = {
        "mean": np.nan if empty else values.mean(),
        "median": np.nan if empty else np.median(values),
        "std": np.nan if empty else values.std(),
    }
    for which, percent in PERCENTILES.items():
        figures[which] = np.nan if empty else np.percentile(values, percent)
    return {f"{which}_{name}_ms": float(value) for which, value in figures.items()}


def _duration_s(results: Sequence[RequestResult]) -> float:
    if not results:
        return 0.0
    return max(r.sent_s + r.e2e_s for r in results) - min(r.sent_s for r in results)

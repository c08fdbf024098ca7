"""What cooperating costs while all owners are equally busy: the same load in both modes."""

from __future__ import annotations

from benchmark.bench import Bench
from benchmark.checks import Section, at_least, at_most
from benchmark.control import Control
from benchmark.rounds import Round, fresh, median, requests
from benchmark.steady import COUNT, SHAPE

_LEAST_THROUGHPUT = 0.92
_MOST_TPOT = 1.12


def measure(bench: Bench) -> Section:
    return bench.by_hand("balanced", _measure)


async def _measure(bench: Bench, cluster: Control) -> Section:
    alone: list[Round] = []
    together: list[Round] = []

    async def one() -> Round:
        return await fresh(cluster, requests(bench.prompts, COUNT, SHAPE))

    await one()  # warm up
    for turn in range(bench.repeat):
        bench.say(f"balanced: round {turn + 1} of {bench.repeat}")
        alone.append(await one())
        await cluster.drop()
        together.append(await one())
        await cluster.restore()
    throughput = median([a.throughput / b.throughput for a, b in zip(together, alone, strict=True)])
    tpot = median(
        [a.median_tpot_ms / b.median_tpot_ms for a, b in zip(together, alone, strict=True)]
    )
    figures = {
        name: {
            "output_throughput": [r.throughput for r in rounds],
            "median_tpot_ms": [r.median_tpot_ms for r in rounds],
        }
        for name, rounds in (("independent", alone), ("cooperative", together))
    }
    return Section(
        figures,
        (
            at_least(2, "throughput cooperating / independent", throughput, _LEAST_THROUGHPUT),
            at_most(2, "median TPOT cooperating / independent", tpot, _MOST_TPOT),
        ),
    )

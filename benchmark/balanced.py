"""What cooperating costs while all owners are equally busy: the same load in both modes.

Groups are made in bursts, so the bars are for owners with 16 requests each, and a budget with which
they fit in either mode. With fewer requests the parameters of a layer, which a group loads once for
each micro-batch, weigh more; that is measured beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmark.bench import Bench
from benchmark.checks import Section, at_least, at_most
from benchmark.control import Control
from benchmark.rounds import Round, fresh, ratio, requests
from benchmark.steady import SHAPE

_BUSY, _LIGHT = 32, 12
_BUDGET = "352MiB"
_MIN_THROUGHPUT = 0.92
_MAX_TPOT = 1.12


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The same load in both modes, turn by turn."""

    independent: list[Round] = field(default_factory=list)
    cooperative: list[Round] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Cooperative / independent."""
        return ratio(
            [r.throughput for r in self.cooperative], [r.throughput for r in self.independent]
        )

    @property
    def tpot(self) -> float:
        """Cooperative / independent."""
        return ratio(
            [r.median_tpot_ms for r in self.cooperative],
            [r.median_tpot_ms for r in self.independent],
        )

    def figures(self) -> dict[str, object]:
        return {
            "throughput_ratio": self.throughput,
            "median_tpot_ratio": self.tpot,
            **{
                mode: {
                    "output_throughput": [r.throughput for r in rounds],
                    "median_tpot_ms": [r.median_tpot_ms for r in rounds],
                }
                for mode, rounds in (
                    ("independent", self.independent),
                    ("cooperative", self.cooperative),
                )
            },
        }


def measure(bench: Bench) -> Section:
    return bench.by_hand("balanced", _measure, budget=_BUDGET)


async def _measure(bench: Bench, cluster: Control) -> Section:
    async def one(count: int) -> Round:
        return await fresh(cluster, requests(bench.prompts, count, SHAPE))

    busy, light = _Pairs(), _Pairs()
    loads = ((_BUSY, busy), (_LIGHT, light))
    await one(_LIGHT)  # warm up
    for turn in range(bench.repeat):
        bench.say(f"balanced: round {turn + 1} of {bench.repeat}")
        for count, pairs in loads:
            pairs.independent.append(await one(count))
        await cluster.drop()
        for count, pairs in loads:
            pairs.cooperative.append(await one(count))
        await cluster.restore()
    return Section(
        {f"{count} requests": pairs.figures() for count, pairs in loads},
        (
            at_least(2, "throughput cooperating / independent", busy.throughput, _MIN_THROUGHPUT),
            at_most(2, "median TPOT cooperating / independent", busy.tpot, _MAX_TPOT),
        ),
    )

"""What users want of a request, and how long one takes that is alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.first_token import FirstTokenLimit

LONE_FACTOR = 5.0
"""LatencyLimits that nobody has named: so many times what a lone request takes, as in the paper."""

USUAL_TOKENS = 512
"""Of a prompt, and of the context of a token, that limits are shown for; shorter ones get as much
time: among others, nobody keeps limits of a few milliseconds."""


_OWNERS_PART = 1.15
"""A decode step is more than its layers: scheduling, head and sampling, which nobody has measured
for the cost model. They took 8 to 20 % on the machines that were looked at."""


class LatencyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds to the first token, and for each token after it, on average."""

    ttft_ms: float
    tpot_ms: float


LimitsByShare = tuple[tuple[float, LatencyLimits], ...]
"""Limits that parts of the requests have, with the share of each; together they are all of them."""


class StepTimes(msgspec.Struct, frozen=True, kw_only=True):
    """A cost model over all layers of a model: milliseconds, with numbers that need not be whole.

    `prefill` and `decode` are coefficients as in `core.cost_model.CostModel`.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    def step_ms(self, requests: float, context: float) -> float:
        """A decode step of `requests` that hold `context` tokens together."""
        step, each, token = self.decode
        return step + each * requests + token * context

    def prompts_ms(self, prompts: float, tokens: float) -> float:
        """A micro-batch of `prompts`, each of `tokens`."""
        batch, each, beta, alpha, _, _ = self.prefill
        return batch + prompts * (each + tokens * (beta + alpha * (tokens + 1) / 2))

    def slower(self, factor: float) -> StepTimes:
        """The same if decode steps take `factor` times as long."""
        return msgspec.structs.replace(self, decode=tuple(factor * c for c in self.decode))

    def alone(self, prompt: float, context: float) -> LatencyLimits:
        """What a request takes to which an instance gives all of its time."""
        return LatencyLimits(ttft_ms=self.prompts_ms(1, prompt), tpot_ms=self.step_ms(1, context))


class Slowness(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as long as costs predict decode steps take: of instances alone, of groups on
    one host, and of groups across hosts.

    They differ: a group adds hops and turns, and its members wait for each other, on one machine
    more than on another, and over a network more than on either.
    """

    alone: float = 1.0
    together: float = 1.0
    across: float = 1.0

    def of(self, stages: int, *, across: bool) -> float:
        """Where a step goes through so many stages, on one host or `across` several."""
        if stages == 1:
            return self.alone
        return self.across if across else self.together


def times_of(costs: Sequence[CostModel], layers: int) -> StepTimes:
    """The mean of several instances; a model with `layers` decoder layers."""
    count = len(costs)
    prefill = zip(*(c.prefill for c in costs), strict=True)
    decode = zip(*(c.decode for c in costs), strict=True)
    return StepTimes(
        prefill=tuple(layers * sum(term) / count for term in prefill),
        decode=tuple(_OWNERS_PART * layers * sum(term) / count for term in decode),
    )


class ServiceLevel(msgspec.Struct, frozen=True, kw_only=True):
    """The limits that were named, in milliseconds; None: by what a lone request takes."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def named(self) -> bool:
        """Whether any is."""
        return self.ttft_ms is not None or self.tpot_ms is not None

    def over(self, other: ServiceLevel) -> ServiceLevel:
        """The same, with those of `other` where none is named here."""
        if not self.named:
            return other
        return ServiceLevel(
            ttft_ms=other.ttft_ms if self.ttft_ms is None else self.ttft_ms,
            tpot_ms=other.tpot_ms if self.tpot_ms is None else self.tpot_ms,
        )

    def known(self, times: StepTimes | None, prompt: float, output: float) -> ServiceLevel:
        """As `limits`, with None for one that depends on times which nobody has measured."""
        if times is None or (self.ttft_ms is not None and self.tpot_ms is not None):
            return self
        found = self.limits(times, prompt, output)
        return ServiceLevel(ttft_ms=found.ttft_ms, tpot_ms=found.tpot_ms)

    def first_token(self, limits: LatencyLimits) -> FirstTokenLimit:
        """That of each request, `limits` being those of a usual one."""
        named = self.ttft_ms is not None
        return FirstTokenLimit(ms=limits.ttft_ms, tokens=0 if named else USUAL_TOKENS)

    def limits(self, times: StepTimes, prompt: float = 0.0, output: float = 0.0) -> LatencyLimits:
        """Those of a request of these lengths; of a usual one without any."""
        context = prompt + output / 2
        lone = times.alone(max(USUAL_TOKENS, prompt), max(USUAL_TOKENS, context))
        return LatencyLimits(
            ttft_ms=LONE_FACTOR * lone.ttft_ms if self.ttft_ms is None else self.ttft_ms,
            tpot_ms=LONE_FACTOR * lone.tpot_ms if self.tpot_ms is None else self.tpot_ms,
        )


UNNAMED = ServiceLevel()
"""Of a request that names no limits."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """So many `requests` are under way for which these limits were named, or none."""

    level: ServiceLevel
    requests: int


def limits_by_share(
    wanted: Iterable[Wanted], usual: ServiceLevel, times: StepTimes, prompt: float, output: float
) -> LimitsByShare:
    """Those of requests of these lengths: what they name themselves, else the `usual` ones.

    All have the usual ones where nobody is under way.
    """
    counts: Counter[LatencyLimits] = Counter()
    for each in wanted:
        counts[each.level.over(usual).limits(times, prompt, output)] += each.requests
    if not (total := counts.total()):
        return ((1.0, usual.limits(times, prompt, output)),)
    return tuple((count / total, limits) for limits, count in counts.items())

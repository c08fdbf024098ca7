"""How much slower than predicted answers have come lately.

A profile knows the layers of an idle machine. What scheduling, sampling, neighbours and clients add
is seen in what instances report: requests that run, and tokens that come of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.load import Load
from kunserve_sglang.policy.pipeline_times import PipelineTimes
from kunserve_sglang.policy.service_level import Slowness, times_of
from kunserve_sglang.policy.state import ClusterState, InstanceState

_WINDOW_S = 10.0

_ENOUGH_TOKENS = 64.0
"""So many tokens of history weigh as much as what is usual."""

_LEAST, _MOST, _MOST_ACROSS = 0.7, 2.0, 20.0
"""Factors beyond these are something else than slowness; a network may be slow indeed."""

_LOOKED_AT = 64
"""Instances; all are of one model, and mostly of one kind."""


@dataclass(slots=True)
class _Kind:
    """What tokens took and should have taken, of instances that were served in one way."""

    took: float = 0.0
    expected: float = 0.0
    answered: float = 0.0
    most: float = _MOST

    def fade(self, seconds: float) -> None:
        fading = math.exp(-seconds / _WINDOW_S)
        self.took *= fading
        self.expected *= fading
        self.answered *= fading

    def factor(self, usual: float) -> float:
        """`usual` where nothing is known."""
        if not self.expected:
            return usual
        known = self.answered / (self.answered + _ENOUGH_TOKENS)
        seen = math.pow(self.took / self.expected, known) * math.pow(usual, 1 - known)
        return min(self.most, max(_LEAST, seen))


class Calibration:
    """Follows the ratio of the time that tokens took to the time that they should have taken.

    What groups were seen to take is not forgotten while there are none, since that is when it is
    asked for. Before the first, they are taken to be as slow as instances alone, and those across
    hosts as slow as those of one host.
    """

    def __init__(self) -> None:
        self._last = float("-inf")
        self._seen: dict[int, Load] = {}
        self._alone = _Kind()
        self._together = _Kind()
        self._across = _Kind(most=_MOST_ACROSS)

    def observe(self, now: float, state: ClusterState) -> None:
        """A snapshot of time `now`, in seconds."""
        seconds = now - self._last
        looked_at = state.instances[:_LOOKED_AT]
        kinds = {s.instance: self._kind(s, state) for s in looked_at}
        for kind in (self._alone, self._together, self._across):
            if kind is self._alone or any(each is kind for each in kinds.values()):
                kind.fade(seconds)
        for owner in looked_at:
            before, load = self._seen.get(owner.instance), owner.load
            if before is None or owner.costs is None or not load.running:
                continue
            tokens = load.tokens - before.tokens
            if tokens < 0:
                continue  # it has begun anew
            kind = kinds[owner.instance]
            kind.took += 1e3 * seconds * load.running
            kind.expected += _expected_ms(owner, owner.costs, before)
            kind.answered += tokens
        self._seen, self._last = {s.instance: s.load for s in looked_at}, now

    @property
    def slowness(self) -> Slowness:
        """What predicted times of decode steps are to be multiplied by."""
        alone = self._alone.factor(usual=1.0)
        together = self._together.factor(usual=alone)
        across = self._across.factor(usual=together)
        return Slowness(alone=alone, together=together, across=across)

    def _kind(self, owner: InstanceState, state: ClusterState) -> _Kind:
        if not owner.layout.cooperative:
            return self._alone
        return self._across if state.spans_hosts(owner.layout) else self._together


def _expected_ms(owner: InstanceState, costs: CostModel, before: Load) -> float:
    """How long all requests should have taken together for what has come since.

    A step brings a token to each of them; prompts that are computed hold up all that run.
    """
    load = owner.load
    pipeline = PipelineTimes(
        times=times_of([costs], owner.layer_count), stages=len(owner.layout.members)
    )
    prompt = max(1.0, (load.slots.used - load.produced) / load.running)
    admitted = max(0, load.arrived - load.waiting - before.arrived + before.waiting)
    prompts = pipeline.prompts_ms(admitted, prompt) if admitted else 0.0
    step = pipeline.step_ms(load.running, load.slots.used)
    tokens: int = load.tokens - before.tokens
    return tokens * step + load.running * prompts

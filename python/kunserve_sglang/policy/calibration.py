"""How much slower than predicted answers have come lately.

A profile knows the layers of an idle machine. What scheduling, sampling, neighbours and clients add
is seen in what instances report: requests that run, and tokens that come of it.
"""

from __future__ import annotations

import math

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.load import Load
from kunserve_sglang.policy.forecast import PipelineTimes
from kunserve_sglang.policy.service_level import times_of
from kunserve_sglang.policy.state import ClusterState, InstanceState

_WINDOW_S = 10.0

_ENOUGH_TOKENS = 64.0
"""So many tokens of history weigh as much as no news: a factor of one."""

_LEAST, _MOST = 0.7, 2.0

_LOOKED_AT = 64
"""Instances; all are of one model, and mostly of one kind."""


class Calibration:
    """Follows the ratio of the time that tokens took to the time that they should have taken."""

    def __init__(self) -> None:
        self._last = float("-inf")
        self._seen: dict[int, Load] = {}
        self._took = 0.0
        self._expected = 0.0
        self._answered = 0.0

    def observe(self, now: float, state: ClusterState) -> None:
        """A snapshot of time `now`, in seconds."""
        seconds = now - self._last
        fading = math.exp(-seconds / _WINDOW_S)
        self._took *= fading
        self._expected *= fading
        self._answered *= fading
        looked_at = state.instances[:_LOOKED_AT]
        for owner in looked_at:
            before, load = self._seen.get(owner.instance), owner.load
            if before is None or owner.costs is None or not load.running:
                continue
            tokens = load.tokens - before.tokens
            if tokens < 0:
                continue  # it has begun anew
            self._took += 1e3 * seconds * load.running
            self._expected += _expected_ms(owner, owner.costs, before)
            self._answered += tokens
        self._seen, self._last = {s.instance: s.load for s in looked_at}, now

    @property
    def factor(self) -> float:
        """What predicted times of decode steps are to be multiplied by."""
        if not self._expected:
            return 1.0
        known = self._answered / (self._answered + _ENOUGH_TOKENS)
        return min(_MOST, max(_LEAST, math.pow(self._took / self._expected, known)))


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

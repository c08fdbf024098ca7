"""Step times of one instance in seconds, in the forms that the simulation needs them in."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kunserve_sglang.core.cost_model import Chunk, CostEstimate, Work
from kunserve_sglang.simulation.admission import Piece
from kunserve_sglang.simulation.cluster_profile import Profile


class Costs:
    """`core.cost_model` over all layers, and the owner's part of a step.

    A run of decode steps has a closed form: every step reads one token more of each request.
    """

    def __init__(self, profile: Profile) -> None:
        self.estimate = CostEstimate(profile.cost)
        self.layers = profile.layers
        self._model = profile.cost
        step, request, context = (profile.layers * c / 1e3 for c in profile.cost.decode)
        self._fixed = profile.step.fixed_ms / 1e3
        self._request = profile.step.request_ms / 1e3
        self._token = profile.step.token_ms / 1e3
        self.stage = profile.step.stage_ms / 1e3
        self.delayed = profile.step.delayed
        self._decode = step + self._fixed
        self._decode_request = request + self._request + self._token
        self._decode_context = context

    def prefill(self, pieces: Sequence[Piece]) -> float:
        """Seconds of a prefill batch on an instance that has all layers."""
        layers = self.layers * self._model.predict(work_of(pieces)) / 1e3
        return self.launch(sum(p[2] for p in pieces)) + layers + self.finish(len(pieces))

    def decode_run(self, count: int, context: int, steps: int) -> float:
        """Seconds of `steps` decode steps of `count` requests, `context` tokens in the first."""
        first = self._decode + self._decode_request * count + self._decode_context * context
        growth = self._decode_context * count
        return steps * first + growth * (steps * (steps - 1) // 2)

    def steps_within(self, count: int, context: int, seconds: float) -> int:
        """Decode steps that are complete after `seconds`: the inverse of `decode_run`."""
        first = self._decode + self._decode_request * count + self._decode_context * context
        growth = self._decode_context * count
        # growth/2 * k^2 + (first - growth/2) * k = seconds
        half = first - growth / 2
        root = math.sqrt(half * half + 2 * growth * max(0.0, seconds))
        steps = int(2 * max(0.0, seconds) / (half + root))
        # Rounding may be off by one either way.
        while steps > 0 and self.decode_run(count, context, steps) > seconds:
            steps -= 1
        while self.decode_run(count, context, steps + 1) <= seconds:
            steps += 1
        return steps

    def launch(self, tokens: int) -> float:
        """The owner's work before the layers; half of a step's fixed cost, and the embedding."""
        return self._fixed / 2 + self._token * tokens

    def finish(self, requests: int) -> float:
        """The owner's work after the layers: the other half, head and sampling."""
        return self._fixed / 2 + self._request * requests


def work_of(pieces: Sequence[Piece]) -> Work:
    """A prefill batch as the cost model sees it."""
    return Work(chunks=tuple(Chunk(before, tokens) for _, before, tokens in pieces))

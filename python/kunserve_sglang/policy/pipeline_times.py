"""What steps take that go through a pipeline."""

from __future__ import annotations

import msgspec

from kunserve_sglang.policy.service_level import StepTimes


class PipelineTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of an owner's work in `stages` stages that run that of as many owners.

    Together they hold every layer once, so all stages together do in a time what each did alone;
    `overhead` is what cooperating adds to that, `cutting` what it adds to prompts, which go in more
    chunks, and each stage takes `hop_ms` to reach.
    """

    times: StepTimes
    stages: int
    overhead: float = 0.1
    cutting: float = 0.3
    hop_ms: float = 1.0

    def step_ms(self, requests: float, context: float) -> float:
        return self._through(self.times.step_ms(requests, context), self.overhead)

    def prompts_ms(self, prompts: float, tokens: float) -> float:
        return self._through(self.times.prompts_ms(prompts, tokens), self.cutting)

    def _through(self, ms: float, overhead: float) -> float:
        return ms if self.stages == 1 else ms * (1 + overhead) + self.hop_ms * self.stages

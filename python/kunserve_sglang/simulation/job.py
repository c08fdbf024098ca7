"""One simulated request."""

from __future__ import annotations

import math

from kunserve_sglang.policy.service_level import UNNAMED, ServiceLevel


class Job:
    """A request: its lengths in tokens, how far it is, and when it got where (seconds).

    `computed` counts the tokens whose KV exists or is being computed, `produced` the output tokens;
    while it decodes in an independent instance, both are kept by the owner for all together. Of
    `output` tokens in the end, its owner expects `expected`. `level` are the limits that it names.
    """

    __slots__ = (
        "arrival",
        "computed",
        "end",
        "expected",
        "failed",
        "first",
        "index",
        "instance",
        "level",
        "output",
        "produced",
        "prompt",
        "retractions",
    )

    def __init__(
        self,
        index: int,
        arrival: float,
        prompt: int,
        output: int,
        level: ServiceLevel = UNNAMED,
    ) -> None:
        self.index = index
        self.level = level
        self.arrival = arrival
        self.prompt = prompt
        self.output = output
        self.instance = -1
        self.computed = 0
        self.produced = 0
        self.expected = 0
        self.first = math.nan
        self.end = math.nan
        self.retractions = 0
        self.failed = False

    @property
    def known(self) -> int:
        """Tokens to compute before the next one can be sampled: prompt, and output so far."""
        return self.prompt + self.produced

    @property
    def in_the_end(self) -> int:
        """Slots it may need at most, with the one that SGLang wants free beside them."""
        return self.prompt + self.output + 1

    @property
    def holds_slots(self) -> bool:
        return self.computed > 0 and not self.done

    @property
    def remaining(self) -> int:
        return self.output - self.produced

    @property
    def done(self) -> bool:
        return self.failed or not math.isnan(self.end)

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.first - self.arrival

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        return (self.end - self.first) / max(1, self.output - 1)

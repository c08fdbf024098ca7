"""How large a burst has to be on this machine, so that memory is short in it and computing is not.

A token takes several times as long on one CPU as on another, and memory is short for as long as
answers take. So a few short loads are timed first, and what is sent, and when, follows from them.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmark.control import control
from benchmark.prompts import PromptSource
from benchmark.rounds import requests, send
from benchmark.workload import Shape
from kunserve_sglang.policy.service_level import LONE_FACTOR

PROMPT_LEN, OUTPUT_LEN = 96, 192
"""Of a request of the burst, where the machine answers it in `_LONGEST_S`."""

LONG_PROMPT = Shape(prompt_len=400, output_len=16)
"""Of the second burst, in which computing is short."""

_LONG_PROMPTS = 24

_MEMORY_ASKED = 2.0
"""How many times the slots that there are the burst asks for."""

_COMPUTING_ASKED = 2.0
"""How many times as fast as prompts can be computed they arrive in the second burst."""

_LONGEST_S = 40.0
"""An answer of the burst among all the others. With it the whole demo ends within five minutes."""

_SHORTEST_OUTPUT = 64
_TIMED = Shape(prompt_len=48, output_len=24)


@dataclass(frozen=True, slots=True)
class Pace:
    """What instances that have nothing else to do take; `slots` are those of all of them.

    Milliseconds of a token of a request `alone` on its instance and of one among `batch`, and from
    a prompt of `LONG_PROMPT` to its first token.
    """

    instances: int
    slots: int
    batch: int
    alone_ms: float
    together_ms: float
    prompt_ms: float

    def token_ms(self, batch: int) -> float:
        """Among so many others: each makes a step longer by the same."""
        each = (self.together_ms - self.alone_ms) / (self.batch - 1)
        return self.alone_ms + max(0.0, each) * (batch - 1)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of both bursts.

    `answer_s` is how long one of the first takes while all of them run, `stretch` how many times as
    long a token then takes as alone; `long_prompts_s` is how long the others take to arrive.
    """

    requests: int
    output_len: int
    answer_s: float
    stretch: float
    long_prompts: int
    long_prompts_s: float

    @property
    def burst_s(self) -> float:
        """While they arrive; nobody has ended by then, so that all want their memory at once."""
        return self.answer_s / 4

    @property
    def before_s(self) -> float:
        return self.answer_s / 2

    @property
    def after_s(self) -> float:
        """As long as the burst is felt by those who come later."""
        return 1.25 * self.answer_s

    @property
    def steady_rate(self) -> float:
        """One or two requests in flight at any time."""
        return 10 / self.answer_s

    def __str__(self) -> str:
        short = "" if self.stretch > LONE_FACTOR else "not "
        return (
            f"the burst asks for {_MEMORY_ASKED:.0f} times the memory that there is, and with all "
            f"of it at once a token takes {self.stretch:.1f} times as long as alone: memory is "
            f"short, and computing is {short}short"
        )


async def measure(url: str, prompts: PromptSource, instances: int) -> Pace:
    """Takes some seconds. Raises `RunError` if a request fails."""
    async with control(url) as cluster:
        slots = instances * await cluster.slots_of_each()
    batch = max(2, requests_of(slots, OUTPUT_LEN) // instances)
    await send(url, requests(prompts, 2 * instances, _TIMED))  # what is done once only
    alone = await send(url, requests(prompts, instances, _TIMED))
    together = await send(url, requests(prompts, batch * instances, _TIMED))
    prompt = await send(url, requests(prompts, instances, LONG_PROMPT))
    return Pace(
        instances=instances,
        slots=slots,
        batch=batch,
        alone_ms=alone.median_tpot_ms,
        together_ms=together.median_tpot_ms,
        prompt_ms=prompt.median_ttft_ms,
    )


def requests_of(slots: int, output_len: int) -> int:
    """As many as ask for `_MEMORY_ASKED` times these slots."""
    return round(_MEMORY_ASKED * slots / (PROMPT_LEN + output_len))


def sized(pace: Pace, scale: float = 1.0) -> Sizes:
    """The bursts for a machine of this pace; `scale` times as many requests."""

    def token_s(output_len: int) -> float:
        return pace.token_ms(requests_of(pace.slots, output_len) // pace.instances) / 1e3

    fits = (n for n in range(OUTPUT_LEN, _SHORTEST_OUTPUT, -8) if n * token_s(n) <= _LONGEST_S)
    output_len = next(fits, _SHORTEST_OUTPUT)
    return Sizes(
        requests=round(scale * requests_of(pace.slots, output_len)),
        output_len=output_len,
        answer_s=output_len * token_s(output_len),
        stretch=1e3 * token_s(output_len) / pace.alone_ms,
        long_prompts=round(scale * _LONG_PROMPTS),
        long_prompts_s=_LONG_PROMPTS * pace.prompt_ms / 1e3 / pace.instances / _COMPUTING_ASKED,
    )

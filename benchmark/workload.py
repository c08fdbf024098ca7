"""What is sent to a cluster, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmark.prompts import PromptSource


@dataclass(frozen=True, slots=True)
class Request:
    """One request of an open-loop workload; `prompt` is text or token ids."""

    arrival_s: float
    prompt: str | tuple[int, ...]
    prompt_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens of the requests of one stream."""

    prompt_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival, and when the burst among them begins and ends."""

    requests: tuple[Request, ...]
    burst_start_s: float
    burst_end_s: float

    @property
    def duration_s(self) -> float:
        """When the last request arrives."""
        return self.requests[-1].arrival_s if self.requests else 0.0

    @property
    def prompt_tokens(self) -> int:
        return sum(r.prompt_len for r in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(r.output_len for r in self.requests)


def steady_and_burst(
    prompts: PromptSource,
    *,
    steady_rate: float,
    steady: Shape,
    burst_requests: int,
    burst: Shape,
    before_s: float,
    burst_s: float,
    after_s: float,
    seed: int,
) -> Workload:
    """A steady Poisson stream over the whole time, and a burst on top of it in the middle.

    The burst's size is given and its arrivals are a Poisson process of that size, because how much
    KV memory it needs must not depend on the seed.
    """
    chance = random.Random(seed)
    total_s = before_s + burst_s + after_s
    arrivals = [(t, steady) for t in _poisson(chance, steady_rate, total_s)]
    arrivals += [(before_s + chance.random() * burst_s, burst) for _ in range(burst_requests)]
    arrivals.sort(key=lambda arrival: arrival[0])
    requests = tuple(_request(prompts, at, shape) for at, shape in arrivals)
    return Workload(requests, burst_start_s=before_s, burst_end_s=before_s + burst_s)


def _poisson(chance: random.Random, rate: float, until_s: float) -> list[float]:
    times: list[float] = []
    now = chance.expovariate(rate) if rate > 0 else until_s
    while now < until_s:
        times.append(now)
        now += chance.expovariate(rate)
    return times


def _request(prompts: PromptSource, arrival_s: float, shape: Shape) -> Request:
    text, length = prompts.text(shape.prompt_len)
    return Request(arrival_s, text, length, shape.output_len)

"""The requests of one owner that decode, and what they add up to."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from kunserve_sglang.simulation.job import Job


class Decoding:
    """Requests in one of two forms.

    `by_step` is for an instance on its own: a heap by the step in which they reach their expected
    length, so that a run of steps costs nothing per request. `ready` is for a group, whose
    micro-batches advance separately: those that are in none.

    `count` requests have `context` tokens, of which `produced` are of their answers. `expected` and
    `remaining` are tokens that they will still produce: by `execution.output_length`, and in truth.
    """

    __slots__ = (
        "by_step",
        "context",
        "count",
        "expected",
        "produced",
        "ready",
        "remaining",
        "steps",
    )

    def __init__(self) -> None:
        self.by_step: list[tuple[int, int, Job]] = []
        self.ready: list[Job] = []
        self.steps = 0
        self.count = 0
        self.context = 0
        self.produced = 0
        self.expected = 0
        self.remaining = 0

    # -- what they add up to ---------------------------------------------------------------------

    def enter(self, job: Job) -> None:
        """Count a request in, whose prompt has been computed."""
        self.count += 1
        self.context += job.known
        self.produced += job.produced
        self.expected += job.expected - job.produced
        self.remaining += job.remaining

    def leave(self, job: Job) -> None:
        """Count a request out."""
        self.count -= 1
        self.context -= job.known
        self.produced -= job.produced
        self.expected -= job.expected - job.produced
        self.remaining -= job.remaining

    def grow(self, tokens: int) -> None:
        """They have produced `tokens` more, all together."""
        self.context += tokens
        self.produced += tokens
        self.expected -= tokens
        self.remaining -= tokens

    # -- by step ---------------------------------------------------------------------------------

    def begin(self, jobs: Iterable[Job]) -> None:
        """These decode from the next step on; they have been counted in."""
        for job in jobs:
            step = self.steps + job.expected - job.produced
            heapq.heappush(self.by_step, (step, job.index, job))

    @property
    def next_step(self) -> int:
        """How many steps there are until one of them is as long as was expected."""
        return self.by_step[0][0] - self.steps

    def advance(self, steps: int) -> Iterator[Job]:
        """Do `steps` steps. Takes out those that are as long as was expected by then."""
        self.steps += steps
        self.grow(steps * self.count)
        while self.by_step and self.by_step[0][0] <= self.steps:
            job = heapq.heappop(self.by_step)[2]
            job.produced = job.expected
            yield job

    # -- both forms ------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """All that are in no micro-batch, with their output so far written down."""
        if self.ready:
            return self.ready
        jobs = []
        for step, _, job in sorted(self.by_step, key=lambda entry: entry[1]):
            job.produced = job.expected - (step - self.steps)
            jobs.append(job)
        return jobs

    def keep(self, jobs: list[Job]) -> None:
        """Of `jobs()`, these are left."""
        if self.by_step:
            self.by_step = []
            self.begin(jobs)
        else:
            self.ready = jobs

    def to_group(self) -> None:
        """From the form for an instance on its own to that for a group."""
        self.ready, self.by_step = self.jobs(), []

    def to_solo(self) -> None:
        """The other way; all micro-batches must have come back."""
        self.begin(self.ready)
        self.ready = []

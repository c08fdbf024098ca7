"""An instance as owner: its queue, its slots, and SGLang's rules of retraction.

After `get_next_batch_to_run` and `retract_decode` of SGLang 0.5.16, page size 1.
Every request is computed as a whole: prefixes that requests share are not simulated.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from itertools import islice

from kunserve_sglang.core.messages import Load, Slots
from kunserve_sglang.execution.output_length import OutputLengths
from kunserve_sglang.simulation.admission import Piece, PrefillAdder
from kunserve_sglang.simulation.cluster_profile import Profile
from kunserve_sglang.simulation.job import Job

INITIAL_RATIO = 0.7
_MIN_RATIO = 0.14 * INITIAL_RATIO
_RATIO_DECAY = (INITIAL_RATIO - _MIN_RATIO) / 600
"""SGLang's estimate of how much of its limit a request will produce, and how it is lowered."""

_RETRACT_STEPS = 20
_LONGEST_OF = 4
"""With more requests waiting, what all of them are expected to need is more than one may need."""


class Owner:
    """Requests and slots of one instance.

    Requests that decode are in one of two forms: `decoding` for an instance on its own, a heap by
    the step in which they reach their expected length, so that a run of steps costs nothing per
    request; `ready` for a group, whose micro-batches advance separately.

    `expected` and `remaining` are tokens that decoding requests will still produce: by
    `execution.output_length`, and in truth.
    """

    __slots__ = (
        "_admissions",
        "_largest",
        "capacity",
        "chunked",
        "context",
        "count",
        "decoding",
        "expected",
        "finished",
        "full",
        "lengths",
        "limits",
        "number",
        "ratio",
        "ready",
        "remaining",
        "retractions",
        "steps",
        "used",
        "waiting",
        "waiting_demand",
    )

    def __init__(self, number: int, capacity: int, limits: Profile) -> None:
        self.number = number
        self.capacity = capacity
        self.limits = limits
        self.used = 0
        self.ratio = INITIAL_RATIO
        self.full = False
        self.waiting: deque[Job] = deque()
        self.waiting_demand = 0
        self.lengths = OutputLengths()
        self.chunked: Job | None = None
        self.decoding: list[tuple[int, int, Job]] = []
        self.ready: list[Job] = []
        self.steps = 0
        self.count = 0
        self.context = 0
        self.expected = 0
        self.remaining = 0
        self.retractions = 0
        self.finished = 0
        self._largest: list[tuple[int, int, Job]] = []
        self._admissions = 0

    # -- load ------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests that hold slots."""
        return self.count + (self.chunked is not None)

    def demand(self, steps_ahead: int = 0) -> int:
        """As `sglang_seam.engine.SglangEngine.load` counts it; see there and `messages.Load`.

        `steps_ahead`: decode steps that have been done and not been accounted for yet.
        """
        ahead = steps_ahead * self.count
        needed = self.waiting_demand + self.expected - ahead
        if self.chunked is not None:
            needed += self.chunked.expected - self.chunked.produced
        if self.waiting:
            first = max(job.in_the_end for job in islice(self.waiting, _LONGEST_OF))
            needed = max(needed, first)
        return self.used + ahead + needed

    def load(self, steps_ahead: int = 0) -> Load:
        used = self.used + steps_ahead * self.count
        return Load(
            slots=Slots(used=used, cached=0, capacity=self.capacity),
            running=self.running,
            waiting=len(self.waiting),
            demand=self.demand(steps_ahead),
            largest=self.largest_request(),
        )

    def largest_request(self) -> int:
        """As `sglang_seam.engine.SglangEngine.largest_request`."""
        largest = self._largest
        while largest and not largest[0][2].holds_slots:
            heapq.heappop(largest)
        return -largest[0][0] if largest else 0

    # -- waiting ---------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        job.instance = self.number
        self._wait(job)

    def _wait(self, job: Job) -> None:
        self._expect(job)
        self.waiting.append(job)
        self.waiting_demand += job.prompt + job.expected

    def _expect(self, job: Job) -> None:
        """Estimate how long its output gets: when it queues up, and when it got longer than that.

        At least a token more than it has, or it would have ended.
        """
        more = self.lengths.remaining(job.produced, job.output, unknown=INITIAL_RATIO)
        job.expected = job.produced + max(1, more)

    # -- prefill ---------------------------------------------------------------------------------

    @property
    def may_admit(self) -> bool:
        """Whether the next step tries to be a prefill."""
        return self.chunked is not None or (not self.full and bool(self.waiting))

    def admit(self, chunk_limit: int) -> list[Piece]:
        """The next prefill batch, whose slots are taken at once; empty if nothing may run."""
        if not self.may_admit:
            return []
        adder = PrefillAdder(
            free=self.capacity - self.used,
            promised=self.ratio * self.remaining,
            chunk=chunk_limit,
            tokens=self.limits.max_prefill_tokens,
        )
        job = self.chunked
        if job is not None:
            take = adder.next_chunk(job)
            if not take:
                return []
            adder.add(job, take)
            if job.computed == job.known:
                self.chunked = None
        self._admit_waiting(adder)
        self.used += sum(piece[2] for piece in adder.pieces)
        return adder.pieces

    def _admit_waiting(self, adder: PrefillAdder) -> None:
        seats = self.limits.max_running_requests - self.count
        while self.waiting:
            if len(adder.pieces) >= seats:
                self.full = True
            if self.full:
                break
            job = self.waiting[0]
            if not adder.admits(job):
                self.full = True
                break
            if self.chunked is not None or adder.no_chunk:
                break
            self.waiting.popleft()
            self.waiting_demand -= job.prompt + job.expected
            adder.begin(job)
            self._admissions += 1
            heapq.heappush(self._largest, (-job.in_the_end, self._admissions, job))
            if job.computed < job.known:
                self.chunked = job
            if adder.no_slots:
                self.full = True
            if adder.no_tokens:
                break

    def prefilled(self, pieces: Iterable[Piece], now: float) -> list[Job]:
        """A prefill batch is through: who begins to decode. Finished requests give back slots."""
        started: list[Job] = []
        for job, before, take in pieces:
            if before + take < job.known:
                self.full = False  # SGLang: the batch got smaller, as the chunk leaves it
                continue
            job.produced += 1
            if job.produced == 1:
                job.first = now
            if job.produced == job.output:
                self._end(job, now)
                self.used -= job.computed
                self.full = False
                continue
            if job.produced == job.expected:
                self._expect(job)
            self.count += 1
            self.context += job.known
            self.expected += job.expected - job.produced
            self.remaining += job.remaining
            started.append(job)
        return started

    # -- decode, on its own ----------------------------------------------------------------------

    def begin_decoding(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            step = self.steps + job.expected - job.produced
            heapq.heappush(self.decoding, (step, job.index, job))

    def most_steps(self) -> int:
        """Decode steps until a request gets as long as expected or slots run out.

        0 if there is no slot left.
        """
        return min(self.decoding[0][0] - self.steps, (self.capacity - self.used) // self.count)

    def advance(self, steps: int, now: float) -> bool:
        """So many decode steps are done, at most `most_steps`; whether some requests finished."""
        self.steps += steps
        grown = steps * self.count
        self.used += grown
        self.context += grown
        self.expected -= grown
        self.remaining -= grown
        self.ratio = max(self.ratio - steps * _RATIO_DECAY, _MIN_RATIO)
        finished = False
        while self.decoding and self.decoding[0][0] <= self.steps:
            job = heapq.heappop(self.decoding)[2]
            job.produced = job.expected
            if job.produced < job.output:
                self._expect_more(job)
                self.begin_decoding((job,))
                continue
            self._leave(job, job.known - 1)
            self._end(job, now)
            finished = True
        return finished

    def _expect_more(self, job: Job) -> None:
        """It decodes, and is as long as was expected."""
        self._expect(job)
        self.expected += job.expected - job.produced

    def _end(self, job: Job, now: float) -> None:
        """It has all its output. What SGLang learns from that is the length."""
        job.end = now
        self.finished += 1
        self.lengths.ended(job.produced, job.output)

    def _leave(self, job: Job, slots: int) -> None:
        """The request no longer decodes."""
        self.count -= 1
        self.context -= job.known
        self.expected -= job.expected - job.produced
        self.remaining -= job.remaining
        self.used -= slots

    # -- decode, in a group ----------------------------------------------------------------------

    def take_ready(self, share: int) -> list[Job]:
        """A micro-batch of at most `share` requests, with a slot each; empty if there is none."""
        batch, rest = self.ready[:share], self.ready[share:]
        if self.capacity - self.used < len(batch):
            return []
        self.ready = rest
        self.used += len(batch)
        self.ratio = max(self.ratio - _RATIO_DECAY, _MIN_RATIO)
        return batch

    def decoded(self, batch: Iterable[Job], now: float) -> None:
        """A decode micro-batch came back: one token more for each of its requests."""
        for job in batch:
            job.produced += 1
            self.context += 1
            self.expected -= 1
            self.remaining -= 1
            if job.produced == job.output:
                self._leave(job, job.known - 1)
                self._end(job, now)
                self.full = False
            else:
                if job.produced == job.expected:
                    self._expect_more(job)
                self.ready.append(job)

    # -- both ------------------------------------------------------------------------------------

    def retract(self) -> None:
        """Slots have run out: those with the least output wait again, until the next step fits.

        If the last one does not fit even alone (a chunked prompt holds the rest), it is given up,
        as SGLang does.
        """
        jobs = self.ready or self._decoding_jobs()
        jobs.sort(key=lambda job: (job.produced, -job.prompt), reverse=True)
        while len(jobs) > 1:
            job = jobs.pop()
            self._leave(job, job.known - 1)
            job.computed = 0
            job.retractions += 1
            self.retractions += 1
            self._wait(job)
            if self.capacity - self.used >= len(jobs):
                break
        if self.capacity - self.used < len(jobs):
            lost = jobs.pop()
            self._leave(lost, lost.known - 1)
            lost.failed = True
            self.finished += 1
        self.full = False
        produced = sum(job.produced for job in jobs) + _RETRACT_STEPS * len(jobs)
        self.ratio = min(1.0, produced / (sum(job.output for job in jobs) + 1))
        if self.decoding:
            self.decoding = []
            self.begin_decoding(jobs)
        else:
            self.ready = jobs

    def rest(self) -> None:
        """Nothing to do: SGLang forgets what it has learnt of output lengths."""
        self.ratio = INITIAL_RATIO

    def to_group(self) -> None:
        """From the form for an instance on its own to that for a group."""
        self.ready = self._decoding_jobs()
        self.decoding = []

    def to_solo(self) -> None:
        """The other way; all micro-batches must have come back."""
        self.begin_decoding(self.ready)
        self.ready = []

    def _decoding_jobs(self) -> list[Job]:
        """Requests in the heap, in order of arrival, with their output so far written down."""
        jobs = []
        for step, _, job in sorted(self.decoding, key=lambda entry: entry[1]):
            job.produced = job.expected - (step - self.steps)
            jobs.append(job)
        return jobs

"""An instance as owner: its queue, its slots, and SGLang's rules of retraction.

After `get_next_batch_to_run` and `retract_decode` of SGLang 0.5.16, page size 1.
Every request is computed as a whole: prefixes that requests share are not simulated.
"""

from __future__ import annotations

from collections.abc import Iterable

from kunserve_sglang.core.first_token import FirstTokenLimit
from kunserve_sglang.core.load import Load, Slots
from kunserve_sglang.execution.output_length import OutputLengths
from kunserve_sglang.simulation.admission import Piece, PrefillAdder
from kunserve_sglang.simulation.cluster_profile import Profile
from kunserve_sglang.simulation.decoding import Decoding
from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.waiting import LargestRequest, WaitingQueue

INITIAL_RATIO = 0.7
_MIN_RATIO = 0.14 * INITIAL_RATIO
_RATIO_DECAY = (INITIAL_RATIO - _MIN_RATIO) / 600
"""SGLang's estimate of how much of its limit a request will produce, and how it is lowered."""

_RETRACT_STEPS = 20


class Owner:
    """Requests and slots of one instance: those that wait, that decode, and `chunked` in between.

    `full`: nobody can be admitted, and SGLang does not try until requests have come, begun to
    decode or ended (`sglang_seam.waiting`).
    """

    __slots__ = (
        "_arrived",
        "_largest",
        "_lengths",
        "_ratio",
        "_tokens",
        "capacity",
        "chunked",
        "decoding",
        "finished",
        "first_token",
        "full",
        "limits",
        "most",
        "number",
        "retractions",
        "used",
        "waiting",
    )

    def __init__(self, number: int, capacity: int, limits: Profile) -> None:
        self.number = number
        self.capacity = capacity
        self.limits = limits
        self.used = 0
        self.most = limits.max_running_requests
        self.first_token = FirstTokenLimit()
        self.full = False
        self.waiting = WaitingQueue()
        self.chunked: Job | None = None
        self.decoding = Decoding()
        self.retractions = 0
        self.finished = 0
        self._arrived = 0
        self._tokens = 0
        self._ratio = INITIAL_RATIO
        self._lengths = OutputLengths()
        self._largest = LargestRequest()

    @property
    def count(self) -> int:
        """Requests that decode."""
        return self.decoding.count

    @property
    def context(self) -> int:
        """Tokens of the requests that decode."""
        return self.decoding.context

    # -- load ------------------------------------------------------------------------------------

    def bound(self, running: int) -> None:
        """The router says how many may run at once; 0: as many as the machine allows."""
        most = min(running, self.limits.max_running_requests) or self.limits.max_running_requests
        if most > self.most:
            self.full = False  # `fill` may have found all seats taken
        self.most = most

    @property
    def running(self) -> int:
        """Requests that hold slots."""
        return self.decoding.count + (self.chunked is not None)

    def demand(self, steps_ahead: int = 0) -> int:
        """As `sglang_seam.engine.SglangEngine.load` counts it; see there and `messages.Load`.

        `steps_ahead`: decode steps that have been done and not been accounted for yet.
        """
        ahead = steps_ahead * self.decoding.count
        needed = self.waiting.demand + self.decoding.expected - ahead
        if self.chunked is not None:
            needed += self.chunked.expected - self.chunked.produced
        if self.waiting:
            needed = max(needed, self.waiting.largest())
        return self.used + ahead + needed

    def load(self, steps_ahead: int = 0) -> Load:
        used = self.used + steps_ahead * self.decoding.count
        return Load(
            slots=Slots(used=used, cached=0, capacity=self.capacity),
            running=self.running,
            waiting=len(self.waiting),
            demand=self.demand(steps_ahead),
            largest=self.largest_request(),
            prompts=self.waiting.prompts,
            longest=self.waiting.largest(),
            produced=self.decoding.produced + steps_ahead * self.decoding.count,
            arrived=self._arrived,
            tokens=self._tokens + steps_ahead * self.decoding.count,
        )

    def largest_request(self) -> int:
        """As `sglang_seam.engine.SglangEngine.largest_request`."""
        return self._largest.slots()

    # -- waiting and prefill ---------------------------------------------------------------------

    def add(self, job: Job) -> None:
        job.instance = self.number
        self._arrived += 1
        self._expect(job)
        self.waiting.add(job)
        self.full = False

    def _expect(self, job: Job) -> None:
        """Estimate how long its output gets: when it queues up, and when it got longer than that.

        At least a token more than it has, or it would have ended.
        """
        more = self._lengths.remaining(job.produced, job.output, unknown=INITIAL_RATIO)
        job.expected = job.produced + max(1, more)

    @property
    def may_admit(self) -> bool:
        """Whether the next step tries to be a prefill."""
        return self.chunked is not None or (not self.full and bool(self.waiting))

    def admit(self, chunk_limit: int, now: float) -> list[Piece]:
        """The next prefill batch, whose slots are taken at once; empty if nothing may run."""
        if not self.may_admit:
            return []
        if self.first_token.ms:
            self.waiting.put_off(self.first_token, now)
        adder = PrefillAdder(
            free=self.capacity - self.used,
            promised=self._ratio * self.decoding.remaining,
            chunk=chunk_limit,
            tokens=self.limits.max_prefill_tokens,
            full=self.full,
        )
        if self.chunked is not None and not adder.go_on(self.chunked):
            return []
        for job in adder.fill(self.waiting, self.most - self.count):
            self._largest.admitted(job)
        self.full, self.chunked = adder.full, adder.chunked
        self.used += sum(piece[2] for piece in adder.pieces)
        return adder.pieces

    def prefilled(self, pieces: Iterable[Piece], now: float) -> list[Job]:
        """A prefill batch is through: who begins to decode. Finished requests give back slots."""
        self.full = False
        started: list[Job] = []
        for job, before, take in pieces:
            if before + take < job.known:
                continue
            job.produced += 1
            self._tokens += 1
            if job.produced == 1:
                job.first = now
            if job.produced == job.output:
                self._end(job, now)
                self.used -= job.computed
                continue
            if job.produced == job.expected:
                self._expect(job)
            self.decoding.enter(job)
            started.append(job)
        return started

    # -- decode, on its own ----------------------------------------------------------------------

    def most_steps(self) -> int:
        """Decode steps until a request gets as long as expected or slots run out.

        0 if there is no slot left.
        """
        decoding = self.decoding
        return min(decoding.next_step, (self.capacity - self.used) // decoding.count)

    def advance(self, steps: int, now: float) -> bool:
        """`steps` decode steps, at most `most_steps`, are done; whether some requests finished."""
        self.used += steps * self.decoding.count
        self._tokens += steps * self.decoding.count
        self._ratio = max(self._ratio - steps * _RATIO_DECAY, _MIN_RATIO)
        finished = False
        for job in self.decoding.advance(steps):
            if job.produced < job.output:
                self._expect_more(job)
                self.decoding.begin((job,))
                continue
            self._leave(job)
            self._end(job, now)
            finished = True
        return finished

    # -- decode, in a group ----------------------------------------------------------------------

    def take_ready(self, share: int) -> list[Job]:
        """A micro-batch of at most `share` requests, with a slot each; empty if there is none."""
        ready = self.decoding.ready
        batch = ready[:share]
        if self.capacity - self.used < len(batch):
            return []
        self.decoding.ready = ready[share:]
        self.used += len(batch)
        self._ratio = max(self._ratio - _RATIO_DECAY, _MIN_RATIO)
        return batch

    def decoded(self, batch: Iterable[Job], now: float) -> None:
        """A decode micro-batch came back: one token more for each of its requests."""
        for job in batch:
            self._tokens += 1
            job.produced += 1
            self.decoding.grow(1)
            if job.produced == job.output:
                self._leave(job)
                self._end(job, now)
                self.full = False
            else:
                if job.produced == job.expected:
                    self._expect_more(job)
                self.decoding.ready.append(job)

    # -- both ------------------------------------------------------------------------------------

    def _expect_more(self, job: Job) -> None:
        """It decodes, and is as long as was expected."""
        self._expect(job)
        self.decoding.expected += job.expected - job.produced

    def _leave(self, job: Job) -> None:
        """The request no longer decodes, and gives back its slots."""
        self.decoding.leave(job)
        self.used -= job.known - 1

    def _end(self, job: Job, now: float) -> None:
        """It has all its output. What SGLang learns from that is the length."""
        job.end = now
        self.finished += 1
        self._lengths.ended(job.produced, job.output)

    def retract(self) -> None:
        """Slots have run out: those with the least output wait again, until the next step fits.

        If the last one does not fit even alone (a chunked prompt holds the rest), it is given up,
        as SGLang does.
        """
        jobs = self.decoding.jobs()
        jobs.sort(key=lambda job: (job.produced, -job.prompt), reverse=True)
        while len(jobs) > 1:
            job = jobs.pop()
            self._leave(job)
            job.computed = 0
            job.retractions += 1
            self.retractions += 1
            self._expect(job)
            self.waiting.add(job)
            if self.capacity - self.used >= len(jobs):
                break
        if self.capacity - self.used < len(jobs):
            lost = jobs.pop()
            self._leave(lost)
            lost.failed = True
            self.finished += 1
        self.full = False
        produced = sum(job.produced for job in jobs) + _RETRACT_STEPS * len(jobs)
        self._ratio = min(1.0, produced / (sum(job.output for job in jobs) + 1))
        self.decoding.keep(jobs)

    def rest(self) -> None:
        """Nothing to do: SGLang forgets what it has learnt of output lengths."""
        self._ratio = INITIAL_RATIO

"""Requests of one owner that wait, and the largest of those that run."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice

from kunserve_sglang.core.first_token import FirstTokenLimit
from kunserve_sglang.simulation.job import Job

_LARGEST_OF = 4
"""With more requests waiting, what all of them are expected to need is more than one may need."""


class WaitingQueue:
    """In order of arrival, but for those that are late; `demand` is the slots that all may need.

    `prompts` are the tokens to compute before they go on, as `seqlen` of SGLang's requests.
    """

    __slots__ = ("_late", "_line", "demand", "prompts")

    def __init__(self) -> None:
        self._line: deque[Job] = deque()
        self._late: deque[Job] = deque()
        self.demand = 0
        self.prompts = 0

    def __len__(self) -> int:
        return len(self._line) + len(self._late)

    def __iter__(self) -> Iterator[Job]:
        return chain(self._line, self._late)

    def add(self, job: Job) -> None:
        """Queue up a request, of which is known how long its output is expected to be."""
        self._line.append(job)
        self.demand += job.prompt + job.expected
        self.prompts += job.known

    @property
    def head(self) -> Job:
        """The next one."""
        return self._line[0] if self._line else self._late[0]

    def take(self) -> Job:
        """Take out the next one."""
        job = (self._line or self._late).popleft()
        self.demand -= job.prompt + job.expected
        self.prompts -= job.known
        return job

    def put_off(self, limit: FirstTokenLimit, now: float) -> None:
        """Those that cannot have their first token in time any more go after those that can.

        As `sglang_seam.waiting` does it, where a prompt may be late behind one that is not yet.
        """

        def late(job: Job) -> bool:
            return not job.produced and limit.past(job.prompt, 1e3 * (now - job.arrival))

        while self._line and late(self._line[0]):
            self._late.append(self._line.popleft())
        waited_enough: list[Job] = []
        while self._late and not late(self._late[0]):
            waited_enough.append(self._late.popleft())
        self._line.extendleft(reversed(waited_enough))

    def largest(self) -> int:
        """Slots that the largest of the first few may need at most; 0 if nobody waits."""
        return max((job.in_the_end for job in islice(self, _LARGEST_OF)), default=0)


class LargestRequest:
    """The most slots that one of the admitted requests may need before it ends."""

    __slots__ = ("_admitted", "_heap")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Job]] = []
        self._admitted = 0

    def admitted(self, job: Job) -> None:
        self._admitted += 1
        heapq.heappush(self._heap, (-job.in_the_end, self._admitted, job))

    def slots(self) -> int:
        """0 if nobody holds slots. Requests that hold none any more are forgotten on the way."""
        heap = self._heap
        while heap and not heap[0][2].holds_slots:
            heapq.heappop(heap)
        return -heap[0][0] if heap else 0

"""Requests of one owner that wait, and the largest of those that run."""

from __future__ import annotations

import heapq
from collections import deque
from itertools import islice

from kunserve_sglang.simulation.job import Job

_LARGEST_OF = 4
"""With more requests waiting, what all of them are expected to need is more than one may need."""


class WaitingQueue(deque[Job]):
    """In order of arrival; `demand` is the slots that all of them are expected to need.

    `prompts` are the tokens to compute before they go on, as `seqlen` of SGLang's requests.
    """

    __slots__ = ("demand", "prompts")

    def __init__(self) -> None:
        super().__init__()
        self.demand = 0
        self.prompts = 0

    def add(self, job: Job) -> None:
        """Queue up a request, of which is known how long its output is expected to be."""
        self.append(job)
        self.demand += job.prompt + job.expected
        self.prompts += job.known

    def take(self) -> Job:
        """The next one."""
        job = self.popleft()
        self.demand -= job.prompt + job.expected
        self.prompts -= job.known
        return job

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

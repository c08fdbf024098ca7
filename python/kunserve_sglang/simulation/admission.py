"""SGLang's rules for the next prefill batch: after `PrefillAdder` of SGLang 0.5.16."""

from __future__ import annotations

from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.waiting import WaitingQueue

_CLIP_NEW_TOKENS = 4096

Piece = tuple[Job, int, int]
"""A chunk of a prompt: the request, the tokens before it, and its own tokens."""


class PrefillAdder:
    """A batch that grows, and what is left for it.

    `free` slots, of which `promised` are what running requests are expected to need; at most
    `chunk` tokens as SGLang cuts prompts, and `tokens` in all. `chunked` is the request of which
    more chunks have to follow, if there is one.
    """

    __slots__ = ("_chunk", "_current", "_free", "_tokens", "_total", "chunked", "full", "pieces")

    def __init__(self, free: int, promised: float, chunk: int, tokens: int, *, full: bool) -> None:
        self.pieces: list[Piece] = []
        self.chunked: Job | None = None
        self.full = full
        self._free = free
        self._total = free - promised
        self._current = free
        self._chunk = chunk
        self._tokens = tokens

    def go_on(self, job: Job) -> bool:
        """The next chunk of a prompt that has been begun; False if it has to wait for slots.

        As in `sglang_seam.admission`, but nothing is left to a running request so that it can end.
        """
        left = min(job.known - job.computed, self._chunk)
        total = int(self._total)
        take = min(left, total if total > 0 else max(0, self._free))
        if take:
            self._add(job, take)
        return take > 0

    def fill(self, waiting: WaitingQueue, seats: int) -> list[Job]:
        """Let waiting requests begin, in order, in a batch of at most `seats`; returns them.

        `full` says afterwards whether others need not try before something changes.
        """
        begun: list[Job] = []
        while waiting and not self.full:
            self.full = len(self.pieces) >= seats or not self._admits(waiting.head)
            if self.full or self.chunked is not None or self._chunk <= 0:
                break
            job = waiting.take()
            self._add(job, min(job.known, self._chunk))
            begun.append(job)
            self.full = self._total <= 0 or self._current <= 0
            if self._chunk <= 0 or self._tokens <= 0:
                break
        return begun

    def _admits(self, job: Job) -> bool:
        """Whether a waiting request would have slots to its end, as far as that is clipped."""
        return job.known + min(job.remaining, _CLIP_NEW_TOKENS) + 1 < self._total

    def _add(self, job: Job, take: int) -> None:
        """The next `take` tokens of the request join the batch."""
        self.pieces.append((job, job.computed, take))
        job.computed += take
        if job.computed == job.known:
            self._total -= min(job.output, _CLIP_NEW_TOKENS)
        else:
            self.chunked = job
        self._total -= take + 1
        self._current -= take + 1
        self._chunk -= take
        self._tokens -= take

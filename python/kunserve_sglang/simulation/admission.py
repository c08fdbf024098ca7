"""SGLang's rules for the next prefill batch: after `PrefillAdder` of SGLang 0.5.16."""

from __future__ import annotations

from kunserve_sglang.simulation.job import Job

_CLIP_NEW_TOKENS = 4096

Piece = tuple[Job, int, int]
"""A chunk of a prompt: the request, the tokens before it, and its own tokens."""


class PrefillAdder:
    """A batch that grows, and what is left for it.

    `free` slots, of which `promised` are what running requests are expected to need; at most
    `chunk` tokens as SGLang cuts prompts, and `tokens` in all.
    """

    __slots__ = ("_chunk", "_current", "_free", "_tokens", "_total", "pieces")

    def __init__(self, free: int, promised: float, chunk: int, tokens: int) -> None:
        self.pieces: list[Piece] = []
        self._free = free
        self._total = free - promised
        self._current = free
        self._chunk = chunk
        self._tokens = tokens

    @property
    def no_slots(self) -> bool:
        """Nobody else would get slots."""
        return self._total <= 0 or self._current <= 0

    @property
    def no_chunk(self) -> bool:
        return self._chunk <= 0

    @property
    def no_tokens(self) -> bool:
        """The batch is as long as it may be."""
        return self.no_chunk or self._tokens <= 0

    def admits(self, job: Job) -> bool:
        """Whether a waiting request would have slots to its end, as far as that is clipped."""
        return job.known + min(job.remaining, _CLIP_NEW_TOKENS) + 1 < self._total

    def next_chunk(self, job: Job) -> int:
        """Tokens of a prompt's next chunk; 0 if it has to wait for slots.

        As in `sglang_seam.admission`, but nothing is left to a running request so that it can end.
        """
        left = min(job.known - job.computed, self._chunk)
        total = int(self._total)
        return min(left, total if total > 0 else max(0, self._free))

    def begin(self, job: Job) -> None:
        """A waiting request joins, with as much of its prompt as fits a chunk."""
        self.add(job, min(job.known, self._chunk))

    def add(self, job: Job, take: int) -> None:
        """The next `take` tokens of the request join the batch."""
        self.pieces.append((job, job.computed, take))
        job.computed += take
        if job.computed == job.known:
            self._total -= min(job.output, _CLIP_NEW_TOKENS)
        self._total -= take + 1
        self._current -= take + 1
        self._chunk -= take
        self._tokens -= take

"""Which prefixes each instance has cached: what it says itself, and what is on its way there.

An instance with an agent reports the blocks of its radix tree; what was sent to it counts as
cached from then on, until a little after the request's end, when its reports must have said so
themselves. Of a plain SGLang server we know only what we have sent there, and remember as much of
that as fits into it. A wrong guess costs time, never correctness.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Protocol

import msgspec

from kunserve_sglang.control.registry import Instance
from kunserve_sglang.core.blocks import BLOCK_TOKENS
from kunserve_sglang.core.messages import CacheReport

_CONFIRM_S = 1.0
"""How long after a request's end its blocks still count as on their way. Reports come every 50 ms,
but only between steps."""

_UNKNOWN_CAPACITY = 1 << 20
"""Token slots of a plain server that does not say how many it has."""


class Prompt(msgspec.Struct, frozen=True):
    """A request as prefill sees it: its tokens (about), and the hashes of its blocks.

    Without hashes it is nothing that any instance could have cached.
    """

    tokens: int
    blocks: Sequence[int] = ()


class Prefixes(Protocol):
    """What one instance has cached. Whoever has a block has all those before it."""

    def __contains__(self, block: int) -> bool: ...

    def __len__(self) -> int: ...

    def sent(self, blocks: Sequence[int]) -> None:
        """A request with these blocks is on its way there."""
        ...

    def ended(self, blocks: Sequence[int]) -> None:
        """That request has its answer, or will never get one."""
        ...

    def flushed(self) -> None:
        """It was told to forget everything, which it does only when it is idle."""
        ...


class ReportedPrefixes:
    """Of an instance with an agent. Before its first full report, it has nothing."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._number: int | None = None
        self._reported: set[int] = set()
        self._expected: Counter[int] = Counter()
        self._fading: deque[tuple[float, Sequence[int]]] = deque()

    @property
    def in_step(self) -> bool:
        """Whether the next report of changes would be enough."""
        return self._number is not None

    def report(self, report: CacheReport) -> None:
        """Follow the instance; after a gap, forget what it said until it has said all anew."""
        if report.full:
            self._reported = set(report.stored)
            self._number = report.number
            if not report.stored:
                self.flushed()
        elif report.number - 1 == self._number:
            self._reported.difference_update(report.removed)
            self._reported.update(report.stored)
            self._number = report.number
        else:
            self._number = None
            self._reported.clear()

    def __contains__(self, block: int) -> bool:
        return block in self._reported or (self.in_step and block in self._expected)

    def __len__(self) -> int:
        return len(self._reported)

    def sent(self, blocks: Sequence[int]) -> None:
        self._fade(self._clock())
        self._expected.update(blocks)

    def ended(self, blocks: Sequence[int]) -> None:
        self._fading.append((self._clock() + _CONFIRM_S, blocks))

    def flushed(self) -> None:
        self._fade(float("inf"))

    def _fade(self, now: float) -> None:
        while self._fading and self._fading[0][0] <= now:
            for block in self._fading.popleft()[1]:
                self._expected[block] -= 1
                if not self._expected[block]:
                    del self._expected[block]


class AssumedPrefixes:
    """Of a plain server: the latest of what was sent there, `capacity` blocks at most."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: dict[int, None] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def sent(self, blocks: Sequence[int]) -> None:
        # The first block comes last, so that the end of a prefix is forgotten before its beginning.
        for block in reversed(blocks):
            self._blocks.pop(block, None)
            self._blocks[block] = None
        while len(self._blocks) > self._capacity:
            del self._blocks[next(iter(self._blocks))]

    def ended(self, blocks: Sequence[int]) -> None:
        """It stays cached, for all we know."""

    def flushed(self) -> None:
        self._blocks.clear()


class PrefixIndex:
    """The prefixes of all instances, by number; and how many tokens that has been good for."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._known: dict[int, tuple[Instance, Prefixes]] = {}
        self.prompt_tokens = 0
        self.hit_tokens = 0

    def cached_tokens(self, instance: Instance, prompt: Prompt) -> int:
        """Tokens that it would not have to prefill; the last one is always computed."""
        prefixes = self._of(instance)
        blocks = prompt.blocks
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if blocks[middle] in prefixes:
                low = middle + 1
            else:
                high = middle
        return max(0, min(low * BLOCK_TOKENS, prompt.tokens - 1))

    @contextmanager
    def on_its_way(self, instance: Instance, prompt: Prompt) -> Iterator[None]:
        """Counts a request as sent to `instance` inside the block."""
        self.prompt_tokens += prompt.tokens
        self.hit_tokens += self.cached_tokens(instance, prompt)
        prefixes = self._of(instance)
        prefixes.sent(prompt.blocks)
        try:
            yield
        finally:
            prefixes.ended(prompt.blocks)

    def report(self, instance: Instance, report: CacheReport) -> None:
        prefixes = self._of(instance)
        if isinstance(prefixes, ReportedPrefixes):
            prefixes.report(report)

    def in_step(self, instance: Instance) -> bool:
        """Whether changes alone will do for this instance; else a full report is needed."""
        prefixes = self._of(instance)
        return not isinstance(prefixes, ReportedPrefixes) or prefixes.in_step

    def flushed(self) -> None:
        """All instances were told to flush their caches."""
        for _, prefixes in self._known.values():
            prefixes.flushed()

    def keep(self, numbers: Collection[int]) -> None:
        """Forget all instances but these."""
        self._known = {n: known for n, known in self._known.items() if n in numbers}

    def sizes(self) -> dict[int, int]:
        """Blocks known of each instance."""
        return {number: len(prefixes) for number, (_, prefixes) in sorted(self._known.items())}

    def _of(self, instance: Instance) -> Prefixes:
        """Whatever was known of another process under the same number is forgotten."""
        known = self._known.get(instance.number)
        if known is None or known[0] is not instance:
            known = self._known[instance.number] = (instance, self._nothing(instance))
        return known[1]

    def _nothing(self, instance: Instance) -> Prefixes:
        if instance.plain:
            return AssumedPrefixes((instance.capacity or _UNKNOWN_CAPACITY) // BLOCK_TOKENS)
        return ReportedPrefixes(self._clock)

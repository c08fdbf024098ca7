"""What the router is told of this instance's prefix cache."""

from __future__ import annotations

from collections.abc import Iterable

from kunserve_sglang.core.messages import CacheReport


class CacheLog:
    """Collects the blocks that enter and leave the cache, as hashes, from report to report.

    A block that came and went between two reports is in neither.
    """

    def __init__(self, instance: int) -> None:
        self._instance = instance
        self._number = 0
        self._full = False
        self._stored: set[int] = set()
        self._removed: set[int] = set()

    @property
    def pending(self) -> bool:
        """Whether there is anything to report."""
        return self._full or bool(self._stored) or bool(self._removed)

    def begin(self, blocks: Iterable[int]) -> None:
        """The next report is full: these are all the blocks there are."""
        self._full = True
        self._stored = set(blocks)
        self._removed = set()

    def store(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if block in self._removed:
                self._removed.remove(block)
            else:
                self._stored.add(block)

    def remove(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if block in self._stored:
                self._stored.remove(block)
            elif not self._full:
                self._removed.add(block)

    def clear(self) -> None:
        """The cache is empty."""
        self.begin(())

    def report(self) -> CacheReport | None:
        """What has changed since the last call; None if nothing has."""
        if not self.pending:
            return None
        self._number += 1
        report = CacheReport(
            instance=self._instance,
            number=self._number,
            full=self._full,
            stored=tuple(self._stored),
            removed=tuple(self._removed),
        )
        self._full = False
        self._stored, self._removed = set(), set()
        return report

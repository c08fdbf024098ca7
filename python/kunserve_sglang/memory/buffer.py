"""One large virtual range whose parts are backed by pages on demand."""

from __future__ import annotations

import numpy as np
import torch

from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.memory.pool import PhysicalPagePool

_UNMAPPED = -1


class VirtualBuffer:
    """Reserved once, so its address never changes; pages come and go anywhere inside it.

    All offsets and lengths are bytes. A page is mapped when any byte of it is asked for, and
    unmapped only when the whole page is let go.
    """

    def __init__(self, pool: PhysicalPagePool, nbytes: int) -> None:
        self._pool = pool
        self._page = pool.page_bytes
        self._table = np.full(pool.pages_for(nbytes), _UNMAPPED, dtype=np.int64)
        self.nbytes = len(self._table) * self._page
        self.address = pool.driver.reserve(self.nbytes)
        self._flat = pool.driver.tensor(self.address, self.nbytes)
        self.mapped_pages = 0

    @property
    def reserved_pages(self) -> int:
        return len(self._table)

    def pages_missing(self, start: int, end: int) -> int:
        """Pages that `map(start, end)` would take from the pool."""
        first, last = self._span(start, end)
        return int(np.count_nonzero(self._table[first:last] == _UNMAPPED))

    def map(self, start: int, end: int) -> int:
        """Back every byte of `[start, end)`; returns the pages taken.

        Raises `OutOfPages` or `MappingRefused`. Every page is in the table, with its place, or in
        the pool, also after that: of several runs of pages, those before the one that failed stay.
        """
        first, last = self._span(start, end)
        holes = np.flatnonzero(self._table[first:last] == _UNMAPPED) + first
        pages = self._pool.take(len(holes))
        taken = 0
        try:
            for run in np.split(holes, np.flatnonzero(np.diff(holes) != 1) + 1):
                here = pages[taken : taken + len(run)]
                if here:
                    self._pool.driver.map(self.address + int(run[0]) * self._page, here)
                    self._table[run] = here
                    self.mapped_pages += len(run)
                    taken += len(run)
        except BaseException:
            self._pool.give(pages[taken:])
            raise
        return len(holes)

    def unmap(self, start: int, end: int) -> int:
        """Let go of the pages that lie wholly in `[start, end)`; returns how many were mapped.

        Raises `MappingRefused`, and lets go of none then.
        """
        first, last = -(-start // self._page), min(end, self.nbytes) // self._page
        if first >= last:
            return 0
        held = np.flatnonzero(self._table[first:last] != _UNMAPPED) + first
        if not len(held):
            return 0
        low, high = int(held[0]), int(held[-1]) + 1
        self._pool.driver.unmap(self.address + low * self._page, high - low)
        self._pool.give(self._table[held].tolist())
        self._table[held] = _UNMAPPED
        self.mapped_pages -= len(held)
        return len(held)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A view of the range from its start on; only mapped parts may be touched."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        if nbytes > self.nbytes:
            raise InternalError(f"a tensor of {nbytes} bytes in a buffer of {self.nbytes}")
        return self._flat[:nbytes].view(dtype).view(shape)

    def close(self) -> None:
        """Unmap everything and give the range back; no tensor on it may be used any more."""
        self.unmap(0, self.nbytes)
        self._pool.driver.release(self.address, self.nbytes)

    def _span(self, start: int, end: int) -> tuple[int, int]:
        if not 0 <= start <= end <= self.nbytes:
            raise InternalError(f"range [{start}, {end}) outside a buffer of {self.nbytes} bytes")
        return start // self._page, -(-end // self._page)

"""A fixed budget of physical pages, and the driver interface that maps them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from kunserve_sglang.core.errors import InternalError, OutOfPages


class PageDriver(Protocol):
    """What an operating system or a GPU driver does with pages.

    Addresses are plain integers. A page is named by its id, `0 <= id < pages`; every id stands for
    one physical page of `page_bytes` bytes for as long as the driver is open.
    """

    page_bytes: int

    def commit(self, pages: int) -> None:
        """Have physical memory for the pages `[0, pages)`; never gives any back.

        Raises `ConfigurationError` if the device has not that much.
        """
        ...

    def reclaim(self) -> None:
        """Return to the device what an allocator keeps of memory that was freed on it."""
        ...

    def reserve(self, nbytes: int) -> int:
        """Reserve a virtual range; touching it before a page is mapped is a fault."""
        ...

    def release(self, address: int, nbytes: int) -> None:
        """Give a reserved range back; nothing may be mapped in it."""
        ...

    def map(self, address: int, pages: Sequence[int]) -> None:
        """Map `pages` one after the other at `address`, readable and writable.

        Raises `MappingRefused` if the system will not, and has mapped none of them then.
        """
        ...

    def unmap(self, address: int, count: int) -> None:
        """Make `count` pages from `address` on inaccessible again; holes among them do not matter.

        Waits for whatever the device is still doing with them. Raises `MappingRefused` if the
        system will not; all of them are mapped as before then.
        """
        ...

    def mappable(self) -> int:
        """A number of pages that could be mapped now, wherever they are and would be."""
        ...

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """The range as one flat uint8 tensor that does not own its memory; nothing is touched."""
        ...

    def close(self) -> None:
        """Free all physical pages."""
        ...


def contiguous_runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """`(first, count)` of each ascending run: one mapping call instead of one a page."""
    start = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1:
            yield pages[start], i - start
            start = i


class PhysicalPagePool:
    """Hands out pages of one size from a budget that never changes.

    Free pages are kept sorted lazily, so that an allocation gets long contiguous runs: each run is
    one mapping in the kernel, and the number of mappings of a process is limited. Physical memory
    is taken from the device with the first use of a page, until `commit` takes the rest: what is
    loaded first and then moved into the pool never needs room twice.
    """

    def __init__(self, driver: PageDriver, pages: int) -> None:
        self.driver = driver
        self.total = pages
        self._free: list[int] = list(range(pages - 1, -1, -1))
        self._sorted = True
        self._committed = 0

    @property
    def page_bytes(self) -> int:
        return self.driver.page_bytes

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` page ids, lowest first. Raises `OutOfPages` and takes nothing if too few.

        Raises `ConfigurationError` if the device has less memory than the pool was promised.
        """
        if count > len(self._free):
            raise OutOfPages(f"{count} pages asked for, {len(self._free)} of {self.total} free")
        if not self._sorted:
            self._free.sort(reverse=True)
            self._sorted = True
        if count == 0:
            return []
        taken = self._free[-count:]
        self._commit(taken[0] + 1)
        del self._free[-count:]
        return taken[::-1]

    def give(self, pages: Sequence[int]) -> None:
        """Return pages; raises `InternalError` if that would make more than there are."""
        if len(self._free) + len(pages) > self.total:
            raise InternalError("a page was returned twice")
        self._free.extend(pages)
        self._sorted = False

    def commit(self) -> None:
        """Allocate memory for all pages, so that a shortage shows now and not in a burst."""
        self._commit(self.total)

    def pages_for(self, nbytes: int) -> int:
        return -(-nbytes // self.page_bytes)

    def _commit(self, pages: int) -> None:
        if pages > self._committed:
            self.driver.commit(pages)
            self._committed = pages

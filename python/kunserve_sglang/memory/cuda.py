"""Pages on a GPU: physical memory of the CUDA driver, mapped handle by handle.

The driver maps and unmaps whole allocations only, so a page is one allocation, and a page is never
shown at two addresses. Neither call waits for a stream: work in flight is waited for before pages
are taken from under it. Each call to the driver costs some microseconds and more for each
allocation in its range, so neighbours are opened and unmapped together.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import torch

from kunserve_sglang.core.errors import (
    ConfigurationError,
    DriverError,
    InternalError,
    MappingRefused,
)
from kunserve_sglang.memory.cuda_driver import CudaDevice, Handle
from kunserve_sglang.memory.dlpack import tensor_at
from kunserve_sglang.memory.pool import contiguous_runs

_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"


class CudaPages:
    """`PageDriver` on one GPU; page `i` is the i-th allocation made."""

    def __init__(
        self, gpu: CudaDevice, page_bytes: int, device: torch.device | None = None
    ) -> None:
        """Takes over `gpu`. `device` is where torch finds its addresses, if it is no real one."""
        if page_bytes % gpu.granularity:
            raise InternalError(f"page size {page_bytes} is no multiple of {gpu.granularity}")
        self.page_bytes = page_bytes
        self._gpu = gpu
        self._device = device or torch.device("cuda", gpu.ordinal)
        self._handles: list[Handle] = []
        self._ranges: dict[int, int] = {}
        self._at: dict[int, int] = {}
        self._shown: set[int] = set()

    def commit(self, pages: int) -> None:
        while len(self._handles) < pages:
            try:
                self._handles.append(self._create())
            except DriverError as error:
                if error.code != _OUT_OF_MEMORY:
                    raise
                missing = (pages - len(self._handles)) * self.page_bytes >> 20
                raise ConfigurationError(
                    f"{self._device} has {self._gpu.memory()[0] >> 20} MiB left where the memory "
                    f"budget needs {missing} MiB more; give a smaller --memory-budget"
                ) from error

    def _create(self) -> Handle:
        """Allocate one page; if memory has run out, free what torch caches and try again."""
        try:
            return self._gpu.create(self.page_bytes)
        except DriverError as error:
            if error.code != _OUT_OF_MEMORY:
                raise
        self.reclaim()
        return self._gpu.create(self.page_bytes)

    def reclaim(self) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()

    def reserve(self, nbytes: int) -> int:
        address = self._gpu.reserve(nbytes)
        self._ranges[address] = nbytes
        return address

    def release(self, address: int, nbytes: int) -> None:
        self._gpu.free(address, nbytes)
        del self._ranges[address]

    def map(self, address: int, pages: Sequence[int]) -> None:
        if not self._shown.isdisjoint(pages):
            raise InternalError(f"pages {sorted(self._shown.intersection(pages))} mapped twice")
        places = range(address, address + len(pages) * self.page_bytes, self.page_bytes)
        done = 0
        try:
            for place, page in zip(places, pages, strict=True):
                self._gpu.map(place, self.page_bytes, self._handles[page])
                done += 1
            self._gpu.allow_access(address, len(pages) * self.page_bytes)
        except DriverError as error:
            if done:
                self._gpu.synchronize()
                self._gpu.unmap(address, done * self.page_bytes)
            raise MappingRefused(str(error)) from error
        self._at.update(zip(places, pages, strict=True))
        self._shown.update(pages)

    def unmap(self, address: int, count: int) -> None:
        self._gpu.synchronize()
        page = self.page_bytes
        mapped = [n for n in range(count) if address + n * page in self._at]
        for first, length in contiguous_runs(mapped):
            try:
                self._gpu.unmap(address + first * page, length * page)
            except DriverError as error:
                self._restore([n for n in mapped if n < first], address)
                raise MappingRefused(str(error)) from error
        self._shown.difference_update(self._at.pop(address + n * page) for n in mapped)

    def mappable(self) -> int:
        return len(self._handles)  # the driver knows no limit but memory

    def _restore(self, numbers: Sequence[int], address: int) -> None:
        """Map pages again that were unmapped before others were refused."""
        for n in numbers:
            place = address + n * self.page_bytes
            self._gpu.map(place, self.page_bytes, self._handles[self._at[place]])
            self._gpu.allow_access(place, self.page_bytes)

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        return tensor_at(address, nbytes, self._device)

    def export(self, pages: Sequence[int]) -> list[int]:
        """One file descriptor a page, for `ForeignPages` elsewhere; the caller closes them."""
        return [self._gpu.export(self._handles[page]) for page in pages]

    def close(self) -> None:
        self._gpu.synchronize()
        for address in self._at:
            self._gpu.unmap(address, self.page_bytes)
        for address, nbytes in self._ranges.items():
            self._gpu.free(address, nbytes)
        for handle in self._handles:
            self._gpu.release(handle)
        self._at, self._ranges, self._handles = {}, {}, []
        self._shown.clear()
        self._gpu.close()


class ForeignPages:
    """Pages of another process on the same GPU, one after the other at an address of ours.

    They stay what they are, whatever their owner maps where, until this is closed.
    """

    def __init__(
        self,
        gpu: CudaDevice,
        fds: Sequence[int],
        page_bytes: int,
        device: torch.device | None = None,
    ) -> None:
        """Takes over `fds` as `CudaPages.export` made them, in this order."""
        self._gpu = gpu
        self._device = device or torch.device("cuda", gpu.ordinal)
        self.nbytes = len(fds) * page_bytes
        try:
            with contextlib.ExitStack() as undo:
                handles = []
                for fd in fds:
                    handles.append(gpu.adopt(fd))
                    undo.callback(gpu.release, handles[-1])
                self.address = gpu.reserve(self.nbytes)
                undo.callback(gpu.free, self.address, self.nbytes)
                for i, handle in enumerate(handles):
                    gpu.map(self.address + i * page_bytes, page_bytes, handle)
                    undo.callback(gpu.unmap, self.address + i * page_bytes, page_bytes)
                gpu.allow_access(self.address, self.nbytes)
                self._undo = undo.pop_all()
        finally:
            for fd in fds:
                os.close(fd)

    def tensor(self) -> torch.Tensor:
        """All of it as flat uint8; not to be used after `close`."""
        return tensor_at(self.address, self.nbytes, self._device)

    def close(self) -> None:
        """Unmap and release the pages."""
        self._gpu.synchronize()
        self._undo.close()

"""Rings in the memory of a GPU, between processes that share it.

The bytes lie in exported pages (`cudaIpcGetMemHandle` does not take such memory, and NCCL refuses
two ranks on one GPU); the tail stays in host memory. A copy on a GPU is over when its stream says
so: the sender waits for its copies before it tells of them, and the receiver copies out at once,
since a tensor that is dead in Python may still be read by work in flight.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable

import torch

from kunserve_sglang.core.errors import (
    ConfigurationError,
    DriverError,
    MappingRefused,
    PeerLost,
)
from kunserve_sglang.memory.cuda import CudaPages, ForeignPages
from kunserve_sglang.memory.cuda_driver import CudaDevice
from kunserve_sglang.transport.data import Malformed, TensorSpec
from kunserve_sglang.transport.ring import (
    HEADER,
    TAIL_BYTES,
    Reader,
    RingWriter,
    Writer,
    tail_in,
    unpack,
)

_PAGE = struct.Struct("<Q")  # behind the tail
_MAX_PAGES = 250
"""Linux takes 253 descriptors in one message."""


class CudaRings:
    """Rings on one GPU."""

    kind = b"cuda"

    def __init__(
        self, open_gpu: Callable[[], CudaDevice], device: torch.device | None = None
    ) -> None:
        """`device` is where torch finds the GPU's addresses, if it is no real one."""
        self._open = open_gpu
        self._device = device

    def writer(self, nbytes: int) -> Writer:
        """Raises `PeerLost` if the GPU has no memory left beside what the budget has taken."""
        try:
            return _CudaWriter(self._open(), nbytes, self._device)
        except (ConfigurationError, DriverError, MappingRefused) as error:
            raise PeerLost(f"no ring to a peer: {error}") from error

    def reader(self, fds: list[int], *, shares_tail: bool) -> Reader:
        gpu = self._open()
        try:
            return _CudaReader(gpu, fds, self._device, shares_tail=shares_tail)
        except DriverError as error:
            gpu.close()
            raise Malformed(f"no ring from a peer: {error}") from error


class _CudaWriter(RingWriter):
    def __init__(self, gpu: CudaDevice, nbytes: int, device: torch.device | None) -> None:
        page = gpu.granularity
        while nbytes > _MAX_PAGES * page:
            page *= 2
        count = -(-nbytes // page)
        self._pages = CudaPages(gpu, page, device)
        try:
            self._pages.commit(count)
            address = self._pages.reserve(count * page)
            self._pages.map(address, range(count))
        except (ConfigurationError, DriverError, MappingRefused):
            self._pages.close()
            raise
        super().__init__(count * page, self._pages.tensor(address, count * page))
        _PAGE.pack_into(self._map, TAIL_BYTES, page)
        self.fds += self._pages.export(range(count))

    def write(self, tensors: list[torch.Tensor]) -> tuple[int, int] | None:
        place = super().write(tensors)
        _settle(self._memory.device)
        return place

    def close(self) -> None:
        """The receiver keeps what it has mapped."""
        self._pages.close()


class _CudaReader:
    def __init__(
        self, gpu: CudaDevice, fds: list[int], device: torch.device | None, *, shares_tail: bool
    ) -> None:
        file, *pages = fds
        try:
            self._map = mmap.mmap(file, HEADER)
        finally:
            os.close(file)
        self._gpu = gpu
        self._tail = tail_in(self._map) if shares_tail else None
        self.released = 0
        (page,) = _PAGE.unpack_from(self._map, TAIL_BYTES)
        self._pages = ForeignPages(gpu, pages, page, device)
        self._memory = self._pages.tensor()

    def read(self, start: int, end: int, specs: tuple[TensorSpec, ...]) -> list[torch.Tensor]:
        at = start % len(self._memory)
        if at + end - start > len(self._memory):
            raise Malformed(f"tensors over the end of a ring, from {start} to {end}")
        own = self._memory[at : at + end - start].clone()
        if end > start:
            _settle(own.device)
            self.released = end
            if self._tail is not None:
                self._tail[0] = end
        return unpack(own, specs)

    def bring(self, memory: torch.Tensor) -> torch.Tensor:
        return memory.to(self._memory.device)

    def close(self) -> None:
        self._pages.close()
        self._gpu.close()


def _settle(device: torch.device) -> None:
    """Wait until the device has done what this thread asked of it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()

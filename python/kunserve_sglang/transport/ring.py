"""A ring of memory between one sender and one receiver; here in host memory.

The sender owns the head; the receiver moves the tail, a counter in the ring's first bytes, when
the tensors that lie there have died. Both are byte counts since the beginning, so that full and
empty differ.
"""

from __future__ import annotations

import mmap
import os
import struct
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kunserve_sglang.transport.data import TensorSpec

ALIGNMENT = 64
TAIL = struct.Struct("<Q")
HEADER = ALIGNMENT  # the tail, on a cache line of its own


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def packed_bytes(tensors: list[torch.Tensor]) -> int:
    """What `pack` needs for these tensors."""
    return sum(aligned(t.nbytes) for t in tensors)


def pack(memory: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Copy the tensors one after the other into flat uint8 `memory`."""
    at = 0
    for tensor in tensors:
        if tensor.nbytes:
            target = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor)
        at += aligned(tensor.nbytes)


def unpack(memory: torch.Tensor, specs: tuple[TensorSpec, ...]) -> list[torch.Tensor]:
    """The tensors in `memory`, not copied."""
    tensors, at = [], 0
    for spec in specs:
        nbytes = spec.torch_dtype.itemsize
        for length in spec.shape:
            nbytes *= length
        if nbytes:
            tensors.append(memory[at : at + nbytes].view(spec.torch_dtype).view(spec.shape))
        else:
            tensors.append(torch.empty(spec.shape, dtype=spec.torch_dtype, device=memory.device))
        at += aligned(nbytes)
    return tensors


def map_shared(fd: int, nbytes: int) -> torch.Tensor:
    """The file as flat uint8; unmapped when the last view of it dies."""
    return torch.from_numpy(np.frombuffer(mmap.mmap(fd, nbytes), dtype=np.uint8))


class Writer(Protocol):
    """Sender's end of a ring."""

    fds: list[int]
    """What the receiver needs, in this order; whoever made the ring closes them."""

    @property
    def room(self) -> int:
        """Bytes that a `write` would find room for in one piece."""
        ...

    def write(self, tensors: list[torch.Tensor]) -> tuple[int, int] | None:
        """Copy in; returns (first byte, end) as counts for `Reader.read`, None if full."""
        ...

    def close(self) -> None: ...


class Reader(Protocol):
    """Receiver's end of a ring."""

    def read(self, start: int, end: int, specs: tuple[TensorSpec, ...]) -> list[torch.Tensor]:
        """The tensors of one `write`. They belong to the caller."""
        ...

    def bring(self, memory: torch.Tensor) -> torch.Tensor:
        """Copy host memory to the device of this ring's tensors."""
        ...

    def close(self) -> None: ...


class Rings(Protocol):
    """Makes both ends of rings in one kind of memory."""

    kind: bytes

    def writer(self, nbytes: int) -> Writer:
        """Raises `PeerLost` if there is no memory for it."""
        ...

    def reader(self, fds: list[int]) -> Reader:
        """Takes over `fds`."""
        ...


class RingWriter:
    """Sender's end, counting bytes; they lie behind the tail in one file, or in `memory`."""

    def __init__(self, nbytes: int, memory: torch.Tensor | None = None) -> None:
        file = os.memfd_create("kunserve-ring", os.MFD_CLOEXEC)
        size = HEADER + (nbytes if memory is None else 0)
        os.ftruncate(file, size)
        self.fds = [file]
        self._map = mmap.mmap(file, size)
        if memory is None:
            memory = torch.from_numpy(np.frombuffer(self._map, dtype=np.uint8, offset=HEADER))
        self._memory = memory
        self._nbytes = nbytes
        self._head = 0

    def close(self) -> None:
        """Nothing to do: the memory goes with its last user."""

    @property
    def room(self) -> int:
        tail: int = TAIL.unpack_from(self._map)[0]
        if tail == self._head:
            return self._nbytes
        used = self._head - tail
        to_end = self._nbytes - self._head % self._nbytes
        free = self._nbytes - used
        return max(min(to_end, free), free - to_end)

    def write(self, tensors: list[torch.Tensor]) -> tuple[int, int] | None:
        needed = packed_bytes(tensors)
        start = self._head
        if start % self._nbytes + needed > self._nbytes:
            start += self._nbytes - start % self._nbytes  # never split over the end
        tail = TAIL.unpack_from(self._map)[0]
        if tail == self._head:
            tail = start  # empty: what is skipped does not count
        if start + needed - tail > self._nbytes:
            return None
        at = start % self._nbytes
        pack(self._memory[at : at + needed], tensors)
        self._head = start + needed
        return start, self._head


@dataclass(slots=True)
class _Lease:
    end: int
    memory: weakref.ref[np.ndarray] | None


class RingReader:
    """Receiver's end: hands out tensors in place and frees what lies there once they are dead."""

    def __init__(self, fd: int) -> None:
        """Maps the ring; `fd` can be closed afterwards."""
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        self._nbytes = len(self._map) - HEADER
        self._leases: deque[_Lease] = deque()

    def read(self, start: int, end: int, specs: tuple[TensorSpec, ...]) -> list[torch.Tensor]:
        if start == end:
            return unpack(torch.empty(0, dtype=torch.uint8), specs)
        lease = _Lease(end, None)
        at = HEADER + start % self._nbytes
        # The tensors keep this array alive, and nothing else does.
        array = np.frombuffer(self._map, dtype=np.uint8, count=end - start, offset=at)
        lease.memory = weakref.ref(array, lambda _: self._release())
        self._leases.append(lease)
        return unpack(torch.from_numpy(array), specs)

    def bring(self, memory: torch.Tensor) -> torch.Tensor:
        return memory

    def close(self) -> None:
        """Nothing to do: the memory goes with the last tensor in it."""

    def _release(self) -> None:
        """Move the tail over all leading leases that have ended (they may end out of order)."""
        tail = 0
        while self._leases and (memory := self._leases[0].memory) and memory() is None:
            tail = self._leases.popleft().end
        if tail:
            TAIL.pack_into(self._map, 0, tail)


class HostRings:
    """Rings in shared memory, where tensors are received without a copy."""

    kind = b"host"

    def writer(self, nbytes: int) -> Writer:
        return RingWriter(nbytes)

    def reader(self, fds: list[int]) -> Reader:
        (file,) = fds
        try:
            return RingReader(file)
        finally:
            os.close(file)

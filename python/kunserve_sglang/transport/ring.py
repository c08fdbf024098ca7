"""A ring of shared memory between one sender and one receiver.

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

import numpy as np
import torch

from kunserve_sglang.transport.data import TensorSpec

ALIGNMENT = 64
_TAIL = struct.Struct("<Q")
_HEADER = ALIGNMENT  # the tail, on a cache line of its own


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
            tensors.append(torch.empty(spec.shape, dtype=spec.torch_dtype))
        at += aligned(nbytes)
    return tensors


def map_shared(fd: int, nbytes: int) -> torch.Tensor:
    """The file as flat uint8; unmapped when the last view of it dies."""
    return torch.from_numpy(np.frombuffer(mmap.mmap(fd, nbytes), dtype=np.uint8))


class RingWriter:
    """Sender's end. `fd` is for the receiver; whoever made the ring closes it."""

    def __init__(self, nbytes: int) -> None:
        self.fd = os.memfd_create("kunserve-ring", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _HEADER + nbytes)
        self._map = mmap.mmap(self.fd, _HEADER + nbytes)
        self._memory = torch.from_numpy(np.frombuffer(self._map, dtype=np.uint8, offset=_HEADER))
        self._nbytes = nbytes
        self._head = 0

    @property
    def room(self) -> int:
        """Bytes that a `write` would find room for in one piece."""
        tail: int = _TAIL.unpack_from(self._map)[0]
        if tail == self._head:
            return self._nbytes
        used = self._head - tail
        to_end = self._nbytes - self._head % self._nbytes
        free = self._nbytes - used
        return max(min(to_end, free), free - to_end)

    def write(self, tensors: list[torch.Tensor]) -> tuple[int, int] | None:
        """Copy in; returns (first byte, end) as counts for `RingReader.read`, None if full."""
        needed = packed_bytes(tensors)
        start = self._head
        if start % self._nbytes + needed > self._nbytes:
            start += self._nbytes - start % self._nbytes  # never split over the end
        tail = _TAIL.unpack_from(self._map)[0]
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
        self._nbytes = len(self._map) - _HEADER
        self._leases: deque[_Lease] = deque()

    def read(self, start: int, end: int, specs: tuple[TensorSpec, ...]) -> list[torch.Tensor]:
        if start == end:
            return unpack(torch.empty(0, dtype=torch.uint8), specs)
        lease = _Lease(end, None)
        at = _HEADER + start % self._nbytes
        # The tensors keep this array alive, and nothing else does.
        array = np.frombuffer(self._map, dtype=np.uint8, count=end - start, offset=at)
        lease.memory = weakref.ref(array, lambda _: self._release())
        self._leases.append(lease)
        return unpack(torch.from_numpy(array), specs)

    def _release(self) -> None:
        """Move the tail over all leading leases that have ended (they may end out of order)."""
        tail = 0
        while self._leases and (memory := self._leases[0].memory) and memory() is None:
            tail = self._leases.popleft().end
        if tail:
            _TAIL.pack_into(self._map, 0, tail)

"""A ring of memory between one sender and one receiver; here in host memory.

The sender owns the head; the receiver moves the tail, a counter in the ring's first bytes, when
the tensors that lie there have died. Both are byte counts since the beginning, so that full and
empty differ.

What is relied on: the sender writes tensors before it tells of them by socket, and the receiver
reads them after, which the kernel's locks order on every CPU. With the tail it is the other way
round: the receiver reads tensors, then stores the tail, and the sender loads the tail, then writes
over them. On x86 no load passes a later store and no store an earlier load, so a tail that is
stored and loaded in one piece is enough. Elsewhere, as on Arm, a CPU may have the tail stored
before the tensors are read, and Python has no barrier to forbid it: there the receiver tells the
tail by socket as well (`tail_is_shared`).
"""

from __future__ import annotations

import mmap
import os
import platform
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kunserve_sglang.transport.data import Malformed, TensorSpec

ALIGNMENT = 64
HEADER = ALIGNMENT  # the tail, on a cache line of its own
TAIL_BYTES = 8
KINDS = (b"host", b"cuda")
"""Of memory in which a ring may lie."""


def tail_is_shared() -> bool:
    """Whether on this CPU the receiver may store the tail where the sender loads it."""
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def tail_in(memory: mmap.mmap) -> memoryview:
    """The tail as `[0]`: an aligned word that is stored and loaded whole, which `struct` is not."""
    return memoryview(memory)[:TAIL_BYTES].cast("Q")


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def packed_bytes(sizes: Iterable[int]) -> int:
    """What `pack` needs for tensors of so many bytes."""
    return sum(map(aligned, sizes))


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
        nbytes = spec.nbytes
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
    nbytes: int
    """The room that there is when nothing is in it."""

    @property
    def room(self) -> int:
        """Bytes that a `write` would find room for in one piece."""
        ...

    def free(self, tail: int) -> None:
        """The receiver has told how far it has let go, where it does not say so in memory."""
        ...

    def write(self, tensors: list[torch.Tensor]) -> tuple[int, int] | None:
        """Copy in; returns (first byte, end) as counts for `Reader.read`, None if full."""
        ...

    def close(self) -> None: ...


class Reader(Protocol):
    """Receiver's end of a ring."""

    released: int
    """The tail."""

    def read(self, start: int, end: int, specs: tuple[TensorSpec, ...]) -> list[torch.Tensor]:
        """The tensors of one `write`. They belong to the caller. Raises `Malformed`."""
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

    def reader(self, fds: list[int], *, shares_tail: bool) -> Reader:
        """Takes over `fds`; stores the tail in memory if told to. Raises `Malformed` if there is no
        ring that can be mapped here.
        """
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
        self.nbytes = nbytes
        self._head = 0
        self._tail = tail_in(self._map)

    def close(self) -> None:
        """Nothing to do: the memory goes with its last user."""

    def free(self, tail: int) -> None:
        self._tail[0] = tail

    @property
    def room(self) -> int:
        tail: int = self._tail[0]
        if tail == self._head:
            return self.nbytes
        used = self._head - tail
        to_end = self.nbytes - self._head % self.nbytes
        free = self.nbytes - used
        return max(min(to_end, free), free - to_end)

    def write(self, tensors: list[torch.Tensor]) -> tuple[int, int] | None:
        needed = packed_bytes(t.nbytes for t in tensors)
        start = self._head
        if start % self.nbytes + needed > self.nbytes:
            start += self.nbytes - start % self.nbytes  # never split over the end
        tail = self._tail[0]
        if tail == self._head:
            tail = start  # empty: what is skipped does not count
        if start + needed - tail > self.nbytes:
            return None
        at = start % self.nbytes
        pack(self._memory[at : at + needed], tensors)
        self._head = start + needed
        return start, self._head


@dataclass(slots=True)
class _Lease:
    end: int
    memory: weakref.ref[np.ndarray] | None


class RingReader:
    """Receiver's end: hands out tensors in place and frees what lies there once they are dead."""

    def __init__(self, fd: int, *, shares_tail: bool) -> None:
        """Maps the ring; `fd` can be closed afterwards."""
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        self._tail = tail_in(self._map) if shares_tail else None
        self.released = 0
        self._nbytes = len(self._map) - HEADER
        self._leases: deque[_Lease] = deque()

    def read(self, start: int, end: int, specs: tuple[TensorSpec, ...]) -> list[torch.Tensor]:
        if start == end:
            return unpack(torch.empty(0, dtype=torch.uint8), specs)
        lease = _Lease(end, None)
        at = HEADER + start % self._nbytes
        if at + end - start > len(self._map):
            raise Malformed(f"tensors over the end of a ring, from {start} to {end}")
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
            self.released = tail
            if self._tail is not None:
                self._tail[0] = tail


class HostRings:
    """Rings in shared memory, where tensors are received without a copy."""

    kind = b"host"

    def writer(self, nbytes: int) -> Writer:
        return RingWriter(nbytes)

    def reader(self, fds: list[int], *, shares_tail: bool) -> Reader:
        try:
            if len(fds) != 1 or os.fstat(fds[0]).st_size <= HEADER:
                raise Malformed("no memory that is a ring")
            return RingReader(fds[0], shares_tail=shares_tail)
        finally:
            for file in fds:
                os.close(file)

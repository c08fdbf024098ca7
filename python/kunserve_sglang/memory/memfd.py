"""Pages on a CPU: one memory file, mapped piece by piece with `mmap(MAP_FIXED)`.

A memory file keeps its content while no mapping shows it, can be mapped at any address, and
disappears with its last descriptor, so nothing is left behind when a process is killed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from kunserve_sglang.core.errors import ConfigurationError, InternalError, MappingRefused
from kunserve_sglang.core.page_sizes import SPARE_MAPPINGS
from kunserve_sglang.memory.pool import contiguous_runs

_PROT_NONE = 0
_PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_MAX_MAPPINGS = Path("/proc/sys/vm/max_map_count")


class MemfdDriver:
    """`PageDriver` over a memory file; page `i` is the file's bytes `[i, i + 1) * page_bytes`."""

    def __init__(self, page_bytes: int, name: str = "kunserve") -> None:
        if page_bytes % mmap.PAGESIZE:
            raise InternalError(f"page size {page_bytes} is no multiple of {mmap.PAGESIZE}")
        self.page_bytes = page_bytes
        self._fd = os.memfd_create(name, os.MFD_CLOEXEC)
        self._committed = 0

    def commit(self, pages: int) -> None:
        # Allocate now: with allocation on first touch, a shortage would be a SIGBUS later.
        start, end = self._committed * self.page_bytes, pages * self.page_bytes
        if end > start:
            try:
                os.posix_fallocate(self._fd, start, end - start)
            except OSError as error:
                raise ConfigurationError(
                    f"no memory for a budget with {pages} pages of {self.page_bytes} bytes: "
                    f"{error.strerror}; give a smaller --memory-budget"
                ) from error
            self._committed = pages

    def reclaim(self) -> None:
        """Nothing to do: large blocks go back to the kernel as soon as they are freed."""

    def reserve(self, nbytes: int) -> int:
        return _mmap(None, nbytes, _PROT_NONE, _RESERVED, -1, 0)

    def release(self, address: int, nbytes: int) -> None:
        if _libc.munmap(address, nbytes):
            raise OSError(ctypes.get_errno(), "munmap of a reserved range failed")

    def map(self, address: int, pages: Sequence[int]) -> None:
        place = address
        try:
            for first, count in contiguous_runs(pages):
                nbytes = count * self.page_bytes
                flags = mmap.MAP_SHARED | _MAP_FIXED
                _mmap(place, nbytes, _PROT_READ_WRITE, flags, self._fd, first * self.page_bytes)
                place += nbytes
        except OSError as error:
            if place > address:
                self._withdraw(address, place - address)
            raise MappingRefused(str(error)) from error

    def unmap(self, address: int, count: int) -> None:
        # Mapping inaccessible memory over the pages is one atomic step: the range stays reserved.
        try:
            _mmap(address, count * self.page_bytes, _PROT_NONE, _RESERVED | _MAP_FIXED, -1, 0)
        except OSError as error:
            raise MappingRefused(str(error)) from error

    def mappable(self) -> int:
        # Every page may need a mapping of its own, and split the one that it lies in. They are not
        # counted, which takes a while, where all pages could have two.
        limit = int(_MAX_MAPPINGS.read_text()) - SPARE_MAPPINGS
        if (left := limit // 2 - self._committed) > 0:
            return left
        with Path("/proc/self/maps").open("rb") as maps:
            used = sum(1 for _ in maps)
        return max(0, limit - used) // 2

    def _withdraw(self, address: int, nbytes: int) -> None:
        """Nothing may be reached any more at pages that were mapped before others were refused.

        Where the system has no mapping left not even for this, it makes these inaccessible, which
        needs none; the next `map` or `unmap` there replaces them.
        """
        try:
            _mmap(address, nbytes, _PROT_NONE, _RESERVED | _MAP_FIXED, -1, 0)
        except OSError:
            if _libc.mprotect(address, nbytes, _PROT_NONE):
                raise InternalError("pages cannot be made inaccessible again") from None

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        window = (ctypes.c_uint8 * nbytes).from_address(address)
        return torch.frombuffer(window, dtype=torch.uint8, count=nbytes)

    def close(self) -> None:
        os.close(self._fd)


def _mmap(
    address: int | None, nbytes: int, protection: int, flags: int, fd: int, offset: int
) -> int:
    result = _libc.mmap(address, nbytes, protection, flags, fd, offset)
    if result is None or result == _FAILED:
        errno = ctypes.get_errno()
        hint = " (raise vm.max_map_count)" if errno == 12 and address is not None else ""
        raise OSError(errno, f"mmap of {nbytes} bytes failed: {os.strerror(errno)}{hint}")
    return int(result)

"""A system that refuses to map and unmap pages, now and then or always."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from cuda.bindings import driver

from kunserve_sglang.core.errors import DriverError
from kunserve_sglang.memory import memfd
from kunserve_sglang.memory.cuda_driver import CudaDevice


@contextmanager
def full_of_mappings() -> Iterator[list[int]]:
    """What the kernel says of its limit leaves this process none; nothing fails yet."""
    with TemporaryDirectory() as folder:
        limit = Path(folder) / "max_map_count"
        limit.write_text("0\n")
        with patch.object(memfd, "_MAX_MAPPINGS", limit):
            yield []


@contextmanager
def refused_mappings(every: int) -> Iterator[list[int]]:
    """Every so manieth call that maps or unmaps pages is refused; yields their numbers, growing.

    On a CPU by the kernel, as with a full `vm.max_map_count`; on a GPU by the driver.
    """
    calls = 0
    refused: list[int] = []

    def refuses() -> bool:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            refused.append(calls)
            return True
        return False

    mmap, map_page, unmap_page = memfd._mmap, CudaDevice.map, CudaDevice.unmap
    code = driver.CUresult.CUDA_ERROR_UNKNOWN.name

    def failing_mmap(
        address: int | None, nbytes: int, protection: int, flags: int, fd: int, offset: int
    ) -> int:
        if address is not None and refuses():
            raise OSError(errno.ENOMEM, "no mapping is left")
        return mmap(address, nbytes, protection, flags, fd, offset)

    def failing_map(self: CudaDevice, address: int, nbytes: int, handle: object) -> None:
        if refuses():
            raise DriverError("cuMemMap", code)
        map_page(self, address, nbytes, handle)

    def failing_unmap(self: CudaDevice, address: int, nbytes: int) -> None:
        if refuses():
            raise DriverError("cuMemUnmap", code)
        unmap_page(self, address, nbytes)

    with (
        patch.object(memfd, "_mmap", failing_mmap),
        patch.object(CudaDevice, "map", failing_map),
        patch.object(CudaDevice, "unmap", failing_unmap),
    ):
        yield refused


class Refusals:
    """In this process, as they are wanted from time to time."""

    def __init__(self) -> None:
        self._refusing = ExitStack()
        self._numbers: list[int] = []

    def begin(self, every: int) -> int:
        """From now on every so manieth mapping fails, or none any more; how many did until now.

        With -1, the limit has been reached, which can be known before.
        """
        before = len(self._numbers)
        self._refusing.close()
        self._numbers = []
        if every:
            refusing = refused_mappings(every) if every > 0 else full_of_mappings()
            self._numbers = self._refusing.enter_context(refusing)
        return before

"""Page pools of every kind that a test can run on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kunserve_sglang.memory import PhysicalPagePool, open_pool
from kunserve_sglang.memory.cuda import CudaPages
from kunserve_sglang.memory.cuda_driver import CudaDevice
from kunserve_sglang.memory.memfd import MemfdDriver
from tests.support.fake_cuda import FakeCuda

HOST_PAGE = 64 << 10
ON_HOST = ("memfd", "fake-cuda")
"""Pools whose memory a CPU can touch."""

OpenPool = Callable[[int], PhysicalPagePool]
"""Makes a pool of so many pages."""


class Pools:
    """Opens pools of one kind; what they have not given back after `close` is a leak."""

    def __init__(self, kind: str, page_bytes: int = HOST_PAGE) -> None:
        self._kind = kind
        self._page = page_bytes
        self._open: list[PhysicalPagePool] = []
        self._fakes: list[FakeCuda] = []

    def __call__(self, pages: int) -> PhysicalPagePool:
        self._open.append(self._make(pages))
        return self._open[-1]

    def _make(self, pages: int) -> PhysicalPagePool:
        if self._kind == "memfd":
            return PhysicalPagePool(MemfdDriver(self._page), pages)
        if self._kind == "fake-cuda":
            self._fakes.append(FakeCuda(granularity=self._page))
            gpu = CudaDevice(0, self._fakes[-1])
            return PhysicalPagePool(CudaPages(gpu, self._page, torch.device("cpu")), pages)
        page = CudaDevice(0).granularity
        return open_pool(torch.device("cuda", 0), pages * page, page_bytes=page)

    def close(self) -> None:
        while self._open:
            self._open.pop().driver.close()
        while self._fakes:
            fake = self._fakes.pop()
            assert fake.clean, f"left behind: {fake}"
            assert not fake.unmapped_while_busy

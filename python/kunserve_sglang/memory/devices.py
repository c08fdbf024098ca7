"""The one place that knows which devices there are."""

from __future__ import annotations

import psutil
import torch

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.page_sizes import page_bytes_for, page_bytes_on_cpu
from kunserve_sglang.memory.cuda import CudaPages
from kunserve_sglang.memory.cuda_driver import CudaDevice
from kunserve_sglang.memory.memfd import MemfdDriver
from kunserve_sglang.memory.pool import PageDriver, PhysicalPagePool

_MAX_PAGE_ON_CUDA = 32 << 20
_MIN_PAGES_OF_A_BUFFER = 50
"""Of a KV buffer: half of its last page is wasted, so a hundredth of the buffer at most."""


def open_pool(
    device: torch.device,
    budget: int,
    *,
    page_bytes: int = 0,
    buffer_bytes: int = 0,
    name: str = "kunserve",
) -> PhysicalPagePool:
    """A pool of `budget` bytes in whole pages, memory to be committed as it is used.

    `page_bytes` 0 chooses by budget, and by what most buffers begin with, `buffer_bytes`. Raises
    `ConfigurationError` if there is no such device.
    """
    driver: PageDriver
    if device.type == "cpu":
        page = page_bytes or page_bytes_on_cpu(budget)
        driver = MemfdDriver(page, name)
    elif device.type == "cuda":
        gpu = CudaDevice(device.index or 0)
        page = page_bytes or page_bytes_on_cuda(budget, gpu.granularity, buffer_bytes)
        driver = CudaPages(gpu, page)
    else:
        raise ConfigurationError(f"--device {device.type}: KunServe has no pages there")
    return PhysicalPagePool(driver, max(0, budget) // page)


def free_memory(device: torch.device) -> int:
    """Bytes of the device that are free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def page_bytes_on_cuda(budget: int, granularity: int, buffer_bytes: int) -> int:
    """The page size of an instance on a GPU whose driver maps multiples of `granularity`.

    The driver takes its time for every page, however large, so pages are larger than they must be
    where hardly anything is wasted by it.
    """
    page = page_bytes_for(budget, granularity, _MAX_PAGE_ON_CUDA)
    while page < _MAX_PAGE_ON_CUDA and 2 * page * _MIN_PAGES_OF_A_BUFFER <= buffer_bytes:
        page *= 2
    return page

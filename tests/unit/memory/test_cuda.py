"""Pages on a GPU, as far as a fake driver can tell: call order, refusals, nothing left behind."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kunserve_sglang.core.errors import (
    ConfigurationError,
    DriverError,
    InternalError,
    MappingRefused,
)
from kunserve_sglang.memory import PhysicalPagePool, VirtualBuffer, open_pool
from kunserve_sglang.memory.cuda import CudaPages, ForeignPages
from kunserve_sglang.memory.cuda_driver import CudaBindings, CudaDevice
from tests.support.fake_cuda import FakeCuda, Result

PAGE = 64 << 10
CPU = torch.device("cpu")


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda(granularity=PAGE)


@pytest.fixture
def pages(fake: FakeCuda) -> Iterator[CudaPages]:
    pages = CudaPages(CudaDevice(0, fake), PAGE, CPU)
    yield pages
    pages.close()
    assert fake.clean


def test_a_run_is_mapped_page_by_page_and_opened_at_once(fake: FakeCuda, pages: CudaPages) -> None:
    pages.commit(4)
    address = pages.reserve(4 * PAGE)
    pages.map(address, [2, 0, 3])
    assert (fake.calls["cuMemMap"], fake.calls["cuMemSetAccess"]) == (3, 1)
    assert len(fake.accessible) == 3


def test_neighbours_are_unmapped_at_once(fake: FakeCuda, pages: CudaPages) -> None:
    pages.commit(7)
    address = pages.reserve(10 * PAGE)
    pages.map(address, [2, 0, 3])
    pages.map(address + 3 * PAGE, [1, 6])  # a neighbour that came later
    pages.map(address + 8 * PAGE, [4, 5])
    pages.unmap(address + PAGE, 8)
    assert fake.calls["cuMemUnmap"] == 2
    assert sorted(fake.mappings) == [address, address + 9 * PAGE]
    pages.map(address + PAGE, [0, 3, 1, 6, 4])


def test_a_range_need_not_begin_at_a_multiple_of_the_page_size(fake: FakeCuda) -> None:
    pages = CudaPages(CudaDevice(0, fake), 4 * PAGE, CPU)
    pages.commit(2)
    address = pages.reserve(12 * PAGE) + PAGE
    pages.map(address, [0, 1])
    pages.unmap(address, 2)
    assert fake.calls["cuMemUnmap"] == 1
    assert not fake.mappings
    pages.close()


def test_nothing_is_unmapped_under_work_in_flight(fake: FakeCuda) -> None:
    pages = CudaPages(CudaDevice(0, fake), PAGE, CPU)
    pages.commit(2)
    address = pages.reserve(2 * PAGE)
    pages.map(address, [0, 1])
    fake.launch()
    pages.unmap(address, 1)
    fake.launch()
    pages.close()
    assert not fake.unmapped_while_busy
    assert fake.clean


def test_a_page_is_shown_at_one_address_only(fake: FakeCuda, pages: CudaPages) -> None:
    pages.commit(3)
    address = pages.reserve(4 * PAGE)
    pages.map(address, [1])
    with pytest.raises(InternalError, match=r"\[1\] mapped twice"):
        pages.map(address + PAGE, [0, 1])
    assert len(fake.mappings) == 1
    pages.unmap(address, 4)
    pages.map(address + PAGE, [0, 1])


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess"])
def test_a_mapping_that_fails_halfway_is_undone(
    fake: FakeCuda, pages: CudaPages, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages.commit(4)
    address = pages.reserve(4 * PAGE)
    original: Callable[..., Any] = getattr(fake, call)
    calls = iter([Result.CUDA_SUCCESS, Result.CUDA_ERROR_OUT_OF_MEMORY])
    if call == "cuMemSetAccess":
        next(calls)

    def fail(*arguments: Any) -> tuple[Any]:
        code = next(calls)
        return original(*arguments) if code == Result.CUDA_SUCCESS else (code,)

    fail.__name__ = call
    with monkeypatch.context() as patch:
        patch.setattr(fake, call, fail)
        with pytest.raises(MappingRefused, match=f"{call} failed: CUDA_ERROR_OUT_OF_MEMORY"):
            pages.map(address, [0, 1, 2])
    assert not fake.mappings
    pages.map(address, [0, 1, 2])


def test_a_budget_beyond_the_device_is_refused_in_one_line() -> None:
    fake = FakeCuda(granularity=PAGE, memory=10 * PAGE)
    pages = CudaPages(CudaDevice(0, fake), PAGE, CPU)
    pool = PhysicalPagePool(pages, 12)
    buffer = VirtualBuffer(pool, 12 * PAGE)
    buffer.map(0, 8 * PAGE)
    with pytest.raises(ConfigurationError, match="give a smaller --memory-budget"):
        pool.commit()
    with pytest.raises(ConfigurationError):
        buffer.map(8 * PAGE, 12 * PAGE)
    assert (pool.free, buffer.mapped_pages, fake.used) == (4, 8, 10 * PAGE)
    pages.close()
    assert fake.clean


def test_memory_that_torch_keeps_unused_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations of an instance come and go, and torch returns nothing by itself."""
    fake = FakeCuda(granularity=PAGE, memory=4 * PAGE)
    gpu = CudaDevice(0, fake)
    pages, kept = CudaPages(gpu, PAGE, CPU), [gpu.create(2 * PAGE)]
    monkeypatch.setattr(pages, "reclaim", lambda: gpu.release(kept.pop()))
    pages.commit(4)
    assert (kept, fake.used) == ([], 4 * PAGE)
    pages.close()
    assert fake.clean


def test_a_page_is_a_multiple_of_what_the_driver_asks_for(fake: FakeCuda) -> None:
    gpu = CudaDevice(0, fake)
    with pytest.raises(InternalError, match="no multiple"):
        CudaPages(gpu, PAGE + 4096)
    CudaPages(gpu, 3 * PAGE).close()


def test_devices_that_cannot_do_it_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no CUDA device 1 here"):
        CudaDevice(1, FakeCuda())
    with pytest.raises(ConfigurationError, match="lacks CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY"):
        CudaDevice(0, FakeCuda(vmm=False))
    with pytest.raises(ConfigurationError, match="no pages there"):
        open_pool(torch.device("meta"), PAGE)


def test_without_the_package_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(ConfigurationError, match="pip install cuda-bindings"):
        CudaDevice(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line() -> None:
    """With the real package, which finds no driver library or no device here."""
    with pytest.raises(ConfigurationError, match="no CUDA device 0 here"):
        open_pool(torch.device("cuda", 0), 1 << 30)


def test_the_interface_is_the_packages_own() -> None:
    """What we call exists in `cuda-bindings` and in the fake, by the same names."""
    from cuda.bindings import driver

    types = [name for name in CudaBindings.__annotations__ if name.startswith("CU")]
    calls = [name for name in vars(CudaBindings) if name.startswith("cu")]
    assert len(types) == 9
    assert len(calls) == 18
    for name in calls:
        assert callable(getattr(driver, name))
        assert callable(getattr(FakeCuda, name))
    for name in types:
        assert getattr(FakeCuda, name) is getattr(driver, name)


def test_pages_reach_another_process(pages: CudaPages) -> None:
    """As descriptors over a socket; both processes then see the same memory."""
    pages.commit(3)
    address = pages.reserve(3 * PAGE)
    pages.map(address, [2, 0, 1])
    ours = pages.tensor(address, 3 * PAGE).view(3, PAGE)
    ours[:, 0] = torch.tensor([20, 0, 10], dtype=torch.uint8)
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        os._exit(_receive_pages(there))
    fds = pages.export([1, 2])
    socket.send_fds(here, [b"x"], fds)
    for fd in fds:
        os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ours[:, 1].tolist() == [21, 0, 11]
    here.close()
    there.close()


def _receive_pages(link: socket.socket) -> int:
    """In the other process: read what is there, and answer in place. 0 if all is well."""
    _, fds, _, _ = socket.recv_fds(link, 1, 2)
    fake = FakeCuda(granularity=PAGE)
    foreign = ForeignPages(CudaDevice(0, fake), fds, PAGE, CPU)
    seen = foreign.tensor().view(2, PAGE)
    good = [int(seen[0, 0]), int(seen[1, 0])] == [10, 20]
    seen[0, 1], seen[1, 1] = 11, 21
    foreign.close()
    return int(not good or bool(fake.handles or fake.ranges or fake.mappings))


def test_pages_that_cannot_be_adopted_leave_nothing_behind(fake: FakeCuda) -> None:
    pages = CudaPages(CudaDevice(0, fake), PAGE, CPU)
    pages.commit(2)
    fds, gpu = pages.export([0, 1]), CudaDevice(0, fake)
    with pytest.raises(DriverError, match="cuMemMap failed"):
        ForeignPages(gpu, fds, 2 * PAGE, CPU)  # not the size they have
    assert len(fake.handles) == 2
    assert list(fake.ranges) == []
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    gpu.close()
    pages.close()
    assert fake.clean

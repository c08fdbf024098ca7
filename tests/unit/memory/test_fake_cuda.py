"""The fake driver refuses what the real one refuses; else tests on it would prove nothing."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from kunserve_sglang.core.errors import DriverError
from kunserve_sglang.memory.cuda_driver import CudaDevice
from tests.support.fake_cuda import FakeCuda, Result

UNIT = 64 << 10


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda(granularity=UNIT)


@pytest.fixture
def gpu(fake: FakeCuda) -> CudaDevice:
    return CudaDevice(0, fake)


def _mapped(gpu: CudaDevice) -> int:
    """Two allocations of two units, one after the other, and a free unit behind them."""
    address = gpu.reserve(5 * UNIT)
    for place in (0, 2):
        gpu.map(address + place * UNIT, 2 * UNIT, gpu.create(2 * UNIT))
    return address


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda gpu, a: gpu.unmap(a, UNIT), id="unmap the first half of a mapping"),
        pytest.param(lambda gpu, a: gpu.unmap(a + UNIT, 2 * UNIT), id="unmap halves of two"),
        pytest.param(lambda gpu, a: gpu.unmap(a, 5 * UNIT), id="unmap what is not mapped"),
        pytest.param(lambda gpu, a: gpu.allow_access(a, 3 * UNIT), id="open half a mapping"),
        pytest.param(lambda gpu, a: gpu.allow_access(a, 5 * UNIT), id="open a hole"),
        pytest.param(lambda gpu, a: gpu.free(a, 5 * UNIT), id="free what is mapped"),
        pytest.param(lambda gpu, a: gpu.free(a + 4 * UNIT, UNIT), id="free part of a range"),
        pytest.param(lambda gpu, a: gpu.map(a, 2 * UNIT, gpu.create(2 * UNIT)), id="map twice"),
        pytest.param(
            lambda gpu, a: gpu.map(a + 4 * UNIT, UNIT, gpu.create(2 * UNIT)), id="map half"
        ),
        pytest.param(
            lambda gpu, a: gpu.map(a + 4 * UNIT, 2 * UNIT, gpu.create(2 * UNIT)),
            id="map beyond the reserved range",
        ),
        pytest.param(lambda gpu, _: gpu.map(UNIT, UNIT, gpu.create(UNIT)), id="map unreserved"),
        pytest.param(
            lambda gpu, a: gpu.map(a + 4 * UNIT + 4096, UNIT, gpu.create(UNIT)), id="misaligned"
        ),
        pytest.param(lambda gpu, _: gpu.create(UNIT + 4096), id="a size between units"),
        pytest.param(lambda gpu, _: gpu.create(0), id="no size"),
        pytest.param(lambda gpu, _: gpu.reserve(1000), id="reserve part of a page"),
        pytest.param(lambda gpu, _: gpu.adopt(-1), id="adopt what is no descriptor"),
    ],
)
def test_it_refuses(
    fake: FakeCuda, gpu: CudaDevice, call: Callable[[CudaDevice, int], Any]
) -> None:
    address = _mapped(gpu)
    before = dict(fake.mappings), dict(fake.ranges)
    with pytest.raises(DriverError) as refused:
        call(gpu, address)
    assert refused.value.code == "CUDA_ERROR_INVALID_VALUE"
    assert (fake.mappings, fake.ranges) == before


def test_a_handle_is_released_once(fake: FakeCuda, gpu: CudaDevice) -> None:
    handle = gpu.create(UNIT)
    gpu.release(handle)
    for call in (gpu.release, gpu.export):
        with pytest.raises(DriverError):
            call(handle)
    assert fake.used == 0


def test_released_memory_lives_as_long_as_it_is_mapped(fake: FakeCuda, gpu: CudaDevice) -> None:
    handle, address = gpu.create(UNIT), gpu.reserve(UNIT)
    gpu.map(address, UNIT, handle)
    gpu.release(handle)
    assert fake.used == UNIT
    gpu.unmap(address, UNIT)
    assert fake.used == 0


def test_several_whole_mappings_are_unmapped_at_once(fake: FakeCuda, gpu: CudaDevice) -> None:
    address = _mapped(gpu)
    gpu.allow_access(address, 4 * UNIT)
    gpu.unmap(address, 4 * UNIT)
    assert not fake.mappings
    gpu.free(address, 5 * UNIT)


def test_memory_runs_out() -> None:
    gpu = CudaDevice(0, FakeCuda(granularity=UNIT, memory=3 * UNIT))
    gpu.create(2 * UNIT)
    assert gpu.memory() == (UNIT, 3 * UNIT)
    with pytest.raises(DriverError, match="OUT_OF_MEMORY"):
        gpu.create(2 * UNIT)


def test_mapped_memory_faults_until_it_is_opened(gpu: CudaDevice) -> None:
    address = _mapped(gpu)
    assert _dies_reading(address)
    gpu.allow_access(address, 2 * UNIT)
    assert not _dies_reading(address)
    assert _dies_reading(address + 2 * UNIT)
    gpu.unmap(address, 2 * UNIT)
    assert _dies_reading(address)


def test_calls_need_a_context(fake: FakeCuda) -> None:
    assert fake.cuDeviceGet(0)[0] == Result.CUDA_ERROR_NOT_INITIALIZED
    gpu = CudaDevice(0, fake)
    gpu.close()
    for call in (gpu.synchronize, gpu.memory, gpu.close):
        with pytest.raises(DriverError, match="INVALID_CONTEXT"):
            call()


def _dies_reading(address: int) -> bool:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os._exit(ctypes.c_uint8.from_address(address).value)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV

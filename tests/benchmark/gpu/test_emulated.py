"""The checks of a GPU's memory, on an emulated GPU: they mix no tensors of host and device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from benchmark.gpu import memory
from benchmark.gpu.check import Bench, Findings
from kunserve_sglang.memory import devices
from tests.support.emulated_gpu import emulated_gpu
from tests.support.emulated_tensors import DEVICE
from tests.support.limits import many_open_files

PAGE = 4096


@pytest.mark.parametrize("check", [memory.conservation, memory.leak, memory.parameters])
def test_checks_for_gpus_keep_the_devices_apart(check: Callable[[Bench, Findings], None]) -> None:
    with emulated_gpu(PAGE), many_open_files():
        check(Bench(partial(devices.CudaDevice, 0), DEVICE, 256 * PAGE), Findings())

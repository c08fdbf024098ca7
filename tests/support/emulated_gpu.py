"""A machine with one emulated GPU: its driver, its memory, and what torch and SGLang ask of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from kunserve_sglang.execution.profile import Timing
from kunserve_sglang.memory import cuda, devices, dlpack
from kunserve_sglang.memory.cuda_driver import CudaDevice
from kunserve_sglang.transport import lane, plane
from tests.support.emulated_tensors import DEVICE, EmulatedDevice, device_view
from tests.support.fake_cuda import FakeCuda

_CPU = torch.device("cpu")
_MEMORY = 8 << 30
_HURRIED = Timing(warmups=0, repeats=1, middle=False, budget_s=0.0)
"""How long something takes here says nothing."""


@contextmanager
def emulated_gpu(granularity: int = 4096) -> Iterator[EmulatedDevice]:
    """In here `cuda` is the emulated GPU, for all threads of this process.

    Pages must not have been taken from under what the GPU was doing.
    """
    fake = FakeCuda(granularity=granularity)
    device = EmulatedDevice(fake)
    run = threading.Thread.run

    def run_with_it(thread: threading.Thread) -> None:
        with device:
            run(thread)

    with ExitStack() as undo:
        for name, stand_in in _of_torch(device, fake).items():
            undo.enter_context(patch.object(torch.cuda, name, stand_in))
        for place, name, stand_in in (
            (threading.Thread, "run", run_with_it),
            (devices, "CudaDevice", partial(CudaDevice, bindings=fake)),
            (plane, "CudaDevice", partial(CudaDevice, bindings=fake)),
            (cuda, "tensor_at", _tensor_at),
            (lane, "_group", partial(_on_cpu, lane._group)),
        ):
            undo.enter_context(patch.object(place, name, stand_in))
        undo.enter_context(device)
        yield device
    assert not fake.unmapped_while_busy


@contextmanager
def emulated_gpu_for_sglang() -> Iterator[EmulatedDevice]:
    """The same where SGLang's kernels for CPUs do what those for GPUs would."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from kunserve_sglang.sglang_seam import assembly

    def reduce(tensor: torch.Tensor, group_name: str) -> None:
        parallel_state._groups[group_name]()._all_reduce_in_place(tensor)

    def gather(output: torch.Tensor, part: torch.Tensor, group_name: str) -> None:
        parallel_state._groups[group_name]()._all_gather_into_tensor(output, part)

    with ExitStack() as undo:
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        backends = {"cuda": "gloo"}
        undo.enter_context(patch.dict(parallel_state._DEVICE_TO_DISTRIBUTED_BACKEND, backends))
        for place, name, stand_in in (
            (parallel_state, "inplace_all_reduce", reduce),
            (parallel_state, "reg_all_gather_into_tensor", gather),
            (assembly, "timing", lambda _: _HURRIED),
            (VocabParallelEmbedding, "_use_triton_embedding", lambda *_: False),
        ):
            undo.enter_context(patch.object(place, name, stand_in))
        yield undo.enter_context(emulated_gpu())


def _tensor_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    assert device == DEVICE
    return device_view(dlpack.tensor_at(address, nbytes, _CPU))


def _on_cpu(make_group: Any, store: Any, rank: int, _: torch.device) -> Any:
    """Where NCCL is not, gloo carries."""
    return make_group(store, rank, _CPU)


def _of_torch(device: EmulatedDevice, fake: FakeCuda) -> dict[str, Any]:
    """Stand-ins for parts of `torch.cuda`. Nothing is ever under way."""

    class Event:
        def __init__(self, **_: object) -> None: ...
        def record(self, *_: object) -> None: ...
        def wait(self, *_: object) -> None: ...
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            device.wait()

    class Stream(Event):
        priority, cuda_stream = 0, 0

        def __init__(self, *_: object, **__: object) -> None: ...
        def wait_stream(self, _: object) -> None: ...
        def wait_event(self, _: object) -> None: ...
        def record_event(self, event: Event | None = None) -> Event:
            return event or Event()

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: object) -> None: ...

    def synchronize(*_: object) -> None:
        device.wait()

    properties = SimpleNamespace(
        uuid=f"emulated-{os.getuid()}",
        name="emulated",
        total_memory=_MEMORY,
        major=9,
        minor=0,
        multi_processor_count=2,
        is_integrated=False,
    )
    current = Stream()
    return {
        "Event": Event,
        "Stream": Stream,
        "stream": Stream,
        "current_stream": lambda *_: current,
        "set_stream": lambda *_: None,
        "synchronize": synchronize,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (_MEMORY - fake.used, _MEMORY),
        "empty_cache": lambda: None,
        "manual_seed_all": lambda _: None,
    }

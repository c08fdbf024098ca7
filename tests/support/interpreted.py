"""Stages with SGLang's attention backends for GPUs, whose kernels Triton interprets on a CPU.

A program, because Triton decides at its import: `python -m tests.support.interpreted MODEL
BACKEND PAGE_SIZE`, with TRITON_INTERPRET=1. Compares what stages compute with the backend for
CPUs: its exit status is 0 if they agree. For the kernels of FlashInfer and FlashAttention there is
torch here.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from sglang.srt.distributed.parallel_state import graph_capture
from sglang.srt.model_executor.forward_context import get_attn_backend

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.instance_config import InstanceConfig
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.instance.parts.engine import Hidden, StageBatch
from kunserve_sglang.sglang_seam import assembly
from kunserve_sglang.sglang_seam.model import LayeredDecoder
from kunserve_sglang.sglang_seam.stage_graphs import Recorder, StageGraphs
from kunserve_sglang.sglang_seam.stages import DeviceStages, HostStages, Stages, on_device
from tests.support.emulated_tensors import EmulatedDevice
from tests.support.member import Member
from tests.support.reference_flash_attention import reference_flash_attention
from tests.support.reference_flashinfer import reference_flashinfer

FIRST, LAST = LayerRange(0, 2), LayerRange(6, 8)
OTHER = LayerRange(2, 4)
SIZES = (2, 4)
OWNER = 7
ROWS, WIDTH = 12, 12
_ALIKE = 2e-5
"""Of the largest value there is: what fp32 leaves of sums."""

BASE = 112
"""Where the owner's slots are in the stage's buffers; beyond the stage's own, as in a group."""


@dataclass(frozen=True)
class Slots:
    """Those of the owner; `together` are a block, and every request begins one."""

    together: int

    @property
    def end(self) -> int:
        """Behind the rows of all requests, in the stage's buffers."""
        return BASE + self.of(ROWS, 0)

    def of(self, row: int, position: int) -> int:
        width = WIDTH + -WIDTH % self.together
        return self.together + row * width + position


def main(model: str, backend: str, page_size: str) -> None:
    """Decode with and without graphs, and prefill after a prefix."""
    slots = Slots(int(page_size))
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.no_grad(),
        reference_flashinfer(),
        reference_flash_attention() if backend == "fa3" else nullcontext(),
    ):
        runner = _runner(model, backend, folder, slots.together)
        decoder = LayeredDecoder(runner.model)
        graphs = StageGraphs(runner, decoder, ranges=(FIRST, LAST), sizes=SIZES, recording=again)
        stages = DeviceStages(runner, decoder, graphs)
        assert len(graphs) == 4
        table = _table(slots).to(runner.torch_device)
        for requests in (1, 3, 4, 2):  # each graph is used by batches of several sizes
            for layers in (FIRST, LAST, OTHER):
                assert stages.captured(decode(slots, requests), layers) == (layers != OTHER)
                _compare(runner, slots, stages, decode(slots, requests), table, layers)
        assert not stages.captured(decode(slots, 5), FIRST)
        _compare(runner, slots, stages, decode(slots, 5), table, FIRST)
        assert not stages.captured(prefill(slots), FIRST)
        elsewhere = table.cpu()  # as those of too many rows are
        _compare(runner, slots, stages, prefill(slots), elsewhere, LAST)
    os._exit(0)  # SGLang's threads would not let it end


@contextmanager
def again() -> Iterator[Recorder]:
    """SGLang's session, in which nothing is recorded."""
    with graph_capture():
        yield run_again


def run_again(step: Callable[[], Hidden]) -> tuple[Callable[[], None], Hidden]:
    """Records nothing: does the step again, into the same memory.

    With the metadata of its recording, as kernels in a graph have it. What a graph contains
    neither waits for the device nor reads the host's memory.
    """
    device = EmulatedDevice.here
    device.waits.clear()
    device.uploads.clear()
    results = step()
    assert not device.waits + device.uploads, (device.waits, device.uploads)
    backend = get_attn_backend()
    metadata = backend.forward_metadata

    def again() -> None:
        backend.forward_metadata = metadata
        for old, new in zip(results, step(), strict=True):
            if old is not None and new is not None:
                old.copy_(new)

    return again, results


def decode(slots: Slots, requests: int) -> StageBatch:
    """Request `i` is in row `2 * i`, and its `5 + i`-th token is the one to come."""
    lengths = torch.tensor([5 + i for i in range(requests)])
    return StageBatch(
        owner=OWNER,
        rows=torch.arange(requests) * 2,
        seq_lens=lengths,
        positions=lengths - 1,
        out_slots=torch.tensor([slots.of(2 * i, 4 + i) for i in range(requests)]),
        prefix_lens=None,
        extend_lens=None,
    )


def prefill(slots: Slots) -> StageBatch:
    """Four tokens after a prefix of three, and two at the beginning."""
    return StageBatch(
        owner=OWNER,
        rows=torch.tensor([1, 3]),
        seq_lens=torch.tensor([7, 2]),
        positions=torch.tensor([3, 4, 5, 6, 0, 1]),
        out_slots=torch.tensor(
            [*(slots.of(1, p) for p in range(3, 7)), slots.of(3, 0), slots.of(3, 1)]
        ),
        prefix_lens=torch.tensor([3, 0]),
        extend_lens=torch.tensor([4, 2]),
    )


def _compare(
    runner: Any,
    slots: Slots,
    stages: DeviceStages,
    batch: StageBatch,
    table: torch.Tensor,
    layers: LayerRange,
) -> None:
    """Hidden states as the backend for CPUs has them, and KV in the same rows and no others.

    That one is given all that it reads where the KV is.
    """
    torch.manual_seed(len(batch.rows))
    tokens, width, place = (
        len(batch.positions),
        runner.model_config.hidden_size,
        runner.torch_device,
    )
    states, residual = (torch.randn(tokens, width, device=place) for _ in range(2))
    hidden = states, residual if layers.lo else None
    host = HostStages(runner, LayeredDecoder(runner.model))
    pool = runner.token_to_kv_pool
    there = replace(on_device(batch, place), rows=batch.rows.to(place))
    expected, written = _run(host, pool, slots, there, table.to(place), layers, hidden)
    got, rewritten = _run(stages, pool, slots, batch, table, layers, hidden)
    for mine, theirs in (*zip(got, expected, strict=True), *zip(rewritten, written, strict=True)):
        # Sums of large values may come to a small one: each CPU rounds them in its own way.
        most = float(theirs.abs().max().cpu())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=_ALIKE * most)


def _run(
    stages: Stages,
    pool: Any,
    slots: Slots,
    batch: StageBatch,
    table: torch.Tensor,
    layers: LayerRange,
    hidden: Hidden,
) -> tuple[Hidden, list[torch.Tensor]]:
    """What comes out, and all rows but the dummies' afterwards; rows are the same before each.

    Beside a device nobody waits for it.
    """
    torch.manual_seed(1)
    used = slice(slots.together, slots.end)
    buffers = [b for layer in layers for b in (pool.k_buffer[layer], pool.v_buffer[layer])]
    for buffer in buffers:
        buffer[used].copy_(torch.randn_like(buffer[used]))
    copy = hidden[0].clone(), None if hidden[1] is None else hidden[1].clone()
    waits = EmulatedDevice.here.waits
    waits.clear()
    result = stages.run(batch, table, BASE, layers, copy)
    assert not waits or isinstance(stages, HostStages), waits
    return result, [buffer[used].clone() for buffer in buffers]


def _table(slots: Slots) -> torch.Tensor:
    """The owner's rows, in the stage's addresses."""
    firsts = torch.tensor([BASE + slots.of(row, 0) for row in range(ROWS)], dtype=torch.int32)
    return firsts[:, None] + torch.arange(WIDTH, dtype=torch.int32)


def _runner(model: str, backend: str, folder: str, page_size: int) -> Any:
    """A scheduler's model runner; measuring would take minutes here."""
    no_model = CostModel(prefill=(0.0,) * 6, decode=(0.0,) * 3)
    assembly.load_or_measure = lambda *_, **__: no_model  # type: ignore[assignment]
    config = InstanceConfig(
        instance=0,
        url="http://interpreted:1",
        control_address=f"ipc://{folder}/control",
        data_socket=f"{folder}/data",
        memory_budget=8_000_000,
        owners=2,
        page_bytes=4096,
    )
    server = {
        "model_path": model,
        "attention_backend": backend,
        "page_size": page_size,
        "device": "cuda",
        "dtype": "float32",
        "max_running_requests": 8,
        "context_length": 256,
        "chunked_prefill_size": 64,
    }
    return Member(config, server, 0).scheduler.tp_worker.model_runner


if __name__ == "__main__":
    main(*sys.argv[1:])

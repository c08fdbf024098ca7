"""Running layers on micro-batches of other owners, with SGLang's attention backends.

An attention backend reads one request table and keeps the metadata of one batch. So stage work has
backends of its own: what SGLang's loop has prepared for the owner's batches is never overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.model_runner_components.attention_backend_setup import (
    get_attention_backend,
)

from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.execution.stage_graphs import batch_sizes, first_drop_ranges
from kunserve_sglang.instance.parts.engine import Hidden, StageBatch
from kunserve_sglang.sglang_seam.model import LayeredDecoder
from kunserve_sglang.sglang_seam.stage_graphs import StageGraphs

_MIN_ROWS = 64
"""As many requests as are measured together at the start."""


class Stages(Protocol):
    """Stage work on one kind of device; `ranges` of layers have graphs."""

    ranges: Sequence[LayerRange]

    def run(
        self, batch: StageBatch, table: torch.Tensor, base: int, layers: LayerRange, hidden: Hidden
    ) -> Hidden:
        """As `instance.parts.engine.Engine.run_stage`."""
        ...

    def captured(self, batch: StageBatch, layers: LayerRange) -> bool:
        """Whether `run` would replay a graph, so that an owner's batches had better go there too.

        Nothing but `run` has to prepare such a batch.
        """
        ...

    def forget_owners(self) -> None: ...


class HostStages:
    """On a CPU: an attention backend for each owner, which reads that owner's table in place."""

    def __init__(self, runner: Any, decoder: LayeredDecoder) -> None:
        self._runner = runner
        self._decoder = decoder
        self._backends: dict[int, AttentionBackend] = {}
        self.ranges: Sequence[LayerRange] = ()

    def run(
        self, batch: StageBatch, table: torch.Tensor, base: int, layers: LayerRange, hidden: Hidden
    ) -> Hidden:
        backend = self._backend(batch.owner, table)
        total = int(batch.seq_lens.sum())
        forward_batch = forward_batch_of(batch, batch.rows, batch.out_slots + base, total)
        with forward_context(ForwardContext(attn_backend=backend)):
            backend.init_forward_metadata(forward_batch)
            return self._decoder.layers(layers, batch.positions, forward_batch, hidden)

    def captured(self, batch: StageBatch, layers: LayerRange) -> bool:
        return False

    def forget_owners(self) -> None:
        self._backends.clear()

    def _backend(self, owner: int, table: torch.Tensor) -> AttentionBackend:
        if owner not in self._backends:
            view = SimpleNamespace(
                device=self._runner.device,
                req_to_token_pool=SimpleNamespace(req_to_token=table),
                token_to_kv_pool=self._runner.token_to_kv_pool,
            )
            self._backends[owner] = TorchNativeAttnBackend(view)
        return self._backends[owner]


class DeviceStages:
    """Beside a device: one backend for all owners, as SGLang's own factory makes it.

    Before each micro-batch the rows that it needs are copied to the top of a table that only this
    backend reads, on the device if their owner's table is there. Its address never changes, so
    captured graphs can read it as well.
    """

    def __init__(
        self, runner: Any, decoder: LayeredDecoder, graphs: StageGraphs | None = None
    ) -> None:
        """To be called while all layers are here. `graphs` are yet to be captured."""
        self._decoder = decoder
        self._device = torch.device(runner.device)
        own = runner.req_to_token_pool.req_to_token
        rows = max(len(own), _MIN_ROWS)
        self._table = torch.zeros((rows, own.shape[1]), dtype=own.dtype, device=self._device)
        self._rows = torch.arange(len(self._table), device=self._device)
        view = RunnerView(runner, self._table)
        self._backend = get_attention_backend(model_runner=view)
        self._graphs = graphs
        self.ranges: Sequence[LayerRange] = () if graphs is None else graphs.ranges
        if graphs is not None:
            graphs.capture(lambda: get_attention_backend(model_runner=view), self._rows)

    def run(
        self, batch: StageBatch, table: torch.Tensor, base: int, layers: LayerRange, hidden: Hidden
    ) -> Hidden:
        self._load(table, batch)
        requests = len(batch.rows)
        there = on_device(batch, self._device)
        total = int(batch.seq_lens.sum())  # of what is on the host: nobody waits for the device
        out_rows = there.out_slots + base
        forward_batch = forward_batch_of(there, self._rows[:requests], out_rows, total)
        forward_batch.seq_lens_cpu = batch.seq_lens
        if batch.prefix_lens is not None and batch.extend_lens is not None:
            forward_batch.extend_prefix_lens_cpu = batch.prefix_lens.tolist()
            forward_batch.extend_seq_lens_cpu = batch.extend_lens.tolist()
            forward_batch.extend_num_tokens = len(batch.positions)
        elif (
            self._graphs is not None and (graph := self._graphs.find(layers, requests)) is not None
        ):
            self._table[requests : graph.size, 0] = 0  # of whom it is filled up with: the dummy
            return graph.replay(forward_batch, hidden)
        with forward_context(ForwardContext(attn_backend=self._backend)):
            self._backend.init_forward_metadata(forward_batch)
            return self._decoder.layers(layers, there.positions, forward_batch, hidden)

    def captured(self, batch: StageBatch, layers: LayerRange) -> bool:
        if self._graphs is None or not batch.decode:
            return False
        return self._graphs.find(layers, len(batch.rows)) is not None

    def forget_owners(self) -> None:
        """Nothing is kept of them."""

    def _load(self, table: torch.Tensor, batch: StageBatch) -> None:
        if len(batch.rows) > len(self._table):
            raise InternalError(
                f"a micro-batch of {len(batch.rows)} requests, where {len(self._table)} may run: "
                "members need the same --max-running-requests"
            )
        width = int(batch.seq_lens.max())
        rows = table[batch.rows.to(table.device, non_blocking=True), :width]
        self._table[: len(rows), :width].copy_(rows, non_blocking=True)


def stages_for(runner: Any, decoder: LayeredDecoder) -> Stages:
    """Stage work on the runner's device; on a GPU with the graphs that a first drop needs."""
    if runner.torch_device.type == "cpu":
        return HostStages(runner, decoder)
    sizes = batch_sizes(runner.instance.stage_graph_max_bs)
    ranges = first_drop_ranges(runner.kv_cache_configurator.profile)
    graphs = StageGraphs(runner, decoder, ranges=ranges, sizes=sizes) if sizes else None
    return DeviceStages(runner, decoder, graphs)


class RunnerView:
    """A model runner as an attention backend sees it, with another request table."""

    def __init__(self, runner: Any, table: torch.Tensor) -> None:
        self._runner = runner
        self.req_to_token_pool = SimpleNamespace(req_to_token=table, size=len(table))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def on_device(batch: StageBatch, device: torch.device) -> StageBatch:
    """The same with its tensors on `device`."""

    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    return StageBatch(
        owner=batch.owner,
        rows=batch.rows,
        seq_lens=batch.seq_lens.to(device, non_blocking=True),
        positions=batch.positions.to(device, non_blocking=True),
        out_slots=batch.out_slots.to(device, non_blocking=True),
        prefix_lens=moved(batch.prefix_lens),
        extend_lens=moved(batch.extend_lens),
    )


def forward_batch_of(
    batch: StageBatch, rows: torch.Tensor, out_rows: torch.Tensor, total: int
) -> ForwardBatch:
    """`total`: of all sequences' lengths."""
    forward_batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE if batch.decode else ForwardMode.EXTEND,
        batch_size=len(batch.rows),
        input_ids=batch.positions,  # which tokens they are nobody asks; some ask how many
        req_pool_indices=rows,
        seq_lens=batch.seq_lens,
        out_cache_loc=out_rows,
        seq_lens_sum=total,
    )
    forward_batch.positions = batch.positions
    forward_batch.extend_prefix_lens = batch.prefix_lens
    forward_batch.extend_seq_lens = batch.extend_lens
    return forward_batch

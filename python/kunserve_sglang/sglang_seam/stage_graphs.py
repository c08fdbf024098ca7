"""Captured decode steps of a stage: which exist, and how one is recorded and run again.

Parameters and KV keep their addresses while layers come and go, so a graph that was captured when
all layers were here is good again whenever its layers are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.distributed.parallel_state import get_tp_group, graph_capture
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode
from sglang.srt.model_executor.runner_utils.pool import get_or_create_global_graph_memory_pool

from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.execution.stage_graphs import Captured
from kunserve_sglang.instance.parts.engine import Hidden
from kunserve_sglang.sglang_seam.model import LayeredDecoder

Recorder = Callable[[Callable[[], Hidden]], tuple[Callable[[], None], Hidden]]
"""Runs a step, and returns how to run it once more and where its results then are."""

Recording = Callable[[], AbstractContextManager[Recorder]]
"""A session in which steps are recorded."""

_WARMUPS = 2
"""Kernels are compiled and chosen, which no graph can contain."""


@contextmanager
def cuda_graphs() -> Iterator[Recorder]:
    """`Recording` on a GPU. Graphs share memory: results stand until the next replay of any.

    It is SGLang's own session: the ranks' collectives take the ways that a graph can contain, and
    at its end the ranks tell one another where those in the graphs find their data.
    """
    ranks = get_tp_group()
    pool = get_or_create_global_graph_memory_pool(torch.cuda)
    with model_capture_mode(), graph_capture() as session:

        def record(step: Callable[[], Hidden]) -> tuple[Callable[[], None], Hidden]:
            for _ in range(_WARMUPS):
                torch.cuda.synchronize()
                ranks.barrier()
                step()
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=pool, stream=session.stream):
                results = step()
            return graph.replay, results

        yield record
    torch.cuda.synchronize()  # the session had a stream of its own


class StageGraphs:
    """Graphs for some ranges of layers and numbers of requests."""

    def __init__(
        self,
        runner: Any,
        decoder: LayeredDecoder,
        *,
        ranges: Sequence[LayerRange],
        sizes: Sequence[int],
        recording: Recording = cuda_graphs,
    ) -> None:
        self._runner = runner
        self._decoder = decoder
        self.ranges = ranges
        self._sizes = sizes
        self._recording = recording
        self._captured: Captured[StageGraph] = Captured()

    def capture(self, make_backend: Callable[[], AttentionBackend], rows: torch.Tensor) -> None:
        """Record them all. `rows` are the numbers of the first rows of the backends' table.

        To be called while all layers are here, by all ranks at the same place of their program. A
        backend keeps the plan of one graph of each size, so every range has one.
        """
        sizes = [size for size in self._sizes if size <= len(rows)]
        if not sizes:
            return
        buffers = _Buffers.for_requests(max(sizes), rows, self._runner)
        with torch.no_grad(), self._recording() as record:
            for layers in self.ranges:
                backend = make_backend()
                backend.init_cuda_graph_state(max(sizes), max(sizes))
                # The largest first: the others find their memory in what it has taken.
                for size in reversed(sizes):
                    graph = StageGraph(layers, size, buffers, backend, self._decoder)
                    graph.capture(record)
                    self._captured.add(layers, size, graph)

    def find(self, layers: LayerRange, requests: int) -> StageGraph | None:
        return self._captured.find(layers, requests)

    def __len__(self) -> int:
        return len(self._captured)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Where all graphs read what they run on, one row a request."""

    rows: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    positions: torch.Tensor
    out_rows: torch.Tensor
    hidden: torch.Tensor
    residual: torch.Tensor

    @classmethod
    def for_requests(cls, most: int, rows: torch.Tensor, runner: Any) -> _Buffers:
        device, width = rows.device, runner.model_config.hidden_size
        return cls(
            rows=rows[:most],
            seq_lens=torch.ones(most, dtype=torch.int64, device=device),
            seq_lens_cpu=torch.ones(most, dtype=torch.int64),
            positions=torch.zeros(most, dtype=torch.int64, device=device),
            out_rows=torch.zeros(most, dtype=torch.int64, device=device),
            hidden=torch.zeros((most, width), dtype=runner.dtype, device=device),
            residual=torch.zeros((most, width), dtype=runner.dtype, device=device),
        )

    def fill(self, batch: ForwardBatch, hidden: Hidden, size: int) -> None:
        """Those beyond the batch are requests of one token, in the dummy slot."""
        count = batch.batch_size
        for buffer, values, blank in (
            (self.seq_lens, batch.seq_lens, 1),
            (self.seq_lens_cpu, batch.seq_lens_cpu, 1),
            (self.positions, batch.positions, 0),
            (self.out_rows, batch.out_cache_loc, 0),
        ):
            buffer[:count].copy_(values)
            buffer[count:size].fill_(blank)
        self.hidden[:count].copy_(hidden[0])
        if hidden[1] is not None:
            self.residual[:count].copy_(hidden[1])


class StageGraph:
    """One range of layers for `size` requests."""

    def __init__(
        self,
        layers: LayerRange,
        size: int,
        buffers: _Buffers,
        backend: AttentionBackend,
        decoder: LayeredDecoder,
    ) -> None:
        self.size = size
        self._layers = layers
        self._buffers = buffers
        self._backend = backend
        self._decoder = decoder
        self._again: Callable[[], None]
        self._results: Hidden

    def capture(self, record: Recorder) -> None:
        batch = self._batch(self.size)
        with forward_context(ForwardContext(attn_backend=self._backend)):
            self._backend.init_forward_metadata_out_graph(batch, in_capture=True)
            self._again, self._results = record(lambda: self._step(batch))

    def replay(self, batch: ForwardBatch, hidden: Hidden) -> Hidden:
        """Run it for a batch of at most `size` requests, whose table rows are loaded."""
        count = batch.batch_size
        self._buffers.fill(batch, hidden, self.size)
        padded = self._batch(batch.seq_lens_sum + self.size - count)
        with forward_context(ForwardContext(attn_backend=self._backend)):
            self._backend.init_forward_metadata_out_graph(padded)
            self._again()
        # Copies: the next replay, of whichever graph, writes there again.
        states, residual = self._results
        return states[:count].clone(), None if residual is None else residual[:count].clone()

    def _batch(self, tokens: int) -> ForwardBatch:
        size, buffers = self.size, self._buffers
        batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=size,
            input_ids=buffers.positions[:size],  # some layers ask how many there are
            req_pool_indices=buffers.rows[:size],
            seq_lens=buffers.seq_lens[:size],
            out_cache_loc=buffers.out_rows[:size],
            seq_lens_sum=tokens,
        )
        batch.seq_lens_cpu = buffers.seq_lens_cpu[:size]
        batch.positions = buffers.positions[:size]
        return batch

    def _step(self, batch: ForwardBatch) -> Hidden:
        self._backend.init_forward_metadata_in_graph(batch)
        buffers, size = self._buffers, self.size
        # The first layer gets embeddings, and no residual stream yet. Layers may write to both.
        residual = buffers.residual[:size].clone() if self._layers.lo else None
        hidden = buffers.hidden[:size].clone(), residual
        return self._decoder.layers(self._layers, batch.positions, batch, hidden)

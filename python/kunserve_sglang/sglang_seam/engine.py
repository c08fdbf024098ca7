"""SGLang's scheduler as the data plane sees it (`instance.parts.engine.Engine`)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.managers.overlap_utils import resolve_forward_inputs
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.core.instance_config import LEAVE_SIGNAL
from kunserve_sglang.core.layout import LayerRange, in_blocks
from kunserve_sglang.core.load import Load, Slots
from kunserve_sglang.core.messages import Attainable
from kunserve_sglang.execution.output_length import OutputLengths
from kunserve_sglang.instance.parts.cache_log import CacheLog
from kunserve_sglang.instance.parts.engine import Hidden, Segment, StageBatch
from kunserve_sglang.sglang_seam.batches import described
from kunserve_sglang.sglang_seam.lengths import in_the_end
from kunserve_sglang.sglang_seam.model import LayeredDecoder
from kunserve_sglang.sglang_seam.prefix_cache import PrefixWatch
from kunserve_sglang.sglang_seam.progress import Progress
from kunserve_sglang.sglang_seam.scheduling import Scheduling
from kunserve_sglang.sglang_seam.stages import stages_for
from kunserve_sglang.sglang_seam.trial import try_parts
from kunserve_sglang.sglang_seam.waiting import WaitingRequests

_CAPACITY_COPIES = (
    "pool_stats_observer",
    "invariant_checker",
    "load_inquirer",
    "kv_events_publisher",
)
"""Parts of the scheduler that copied `max_total_num_tokens` when they were built."""


class SglangEngine:
    """Everything here runs on the scheduler's thread, between its steps or inside a forward."""

    def __init__(self, scheduler: Scheduling, waiting: WaitingRequests, progress: Progress) -> None:
        self._scheduler = scheduler
        self._waiting = waiting
        self._progress = progress
        self._runner = scheduler.tp_worker.model_runner
        self._pool = self._runner.token_to_kv_pool
        self._allocator = scheduler.token_to_kv_pool_allocator
        self._decoder = LayeredDecoder(self._runner.model)
        self._torch_device: torch.device = self._runner.torch_device
        self._stages = stages_for(self._runner, self._decoder)
        try_parts(self._decoder, self._stages, self._torch_device, scheduler.page_size)
        self._arrived: Hidden | None = None
        self._lengths = OutputLengths()
        self.requests_arrived = 0
        self._answered = 0
        self._prefixes: PrefixWatch | None = None
        self.cooperating = False
        self.layer_count = self._decoder.layer_count

    # -- load ------------------------------------------------------------------------------------

    def load(self) -> Load:
        scheduler = self._scheduler
        running = scheduler.requests_with_slots()
        waiting = scheduler.waiting_queue
        cached = scheduler.tree_cache.evictable_size()
        used = self._allocator.size - self._allocator.available_size() - cached
        expected = sum(self._expected_output(r) for r in (*running, *waiting))
        prompts = sum(r.seqlen for r in waiting)
        # SGLang admits nobody for whom not even the longest possible answer would fit.
        first = max((in_the_end(r, scheduler.page_size) for r in waiting), default=0)
        return Load(
            slots=Slots(used=used, cached=cached, capacity=self._allocator.size),
            running=len(running),
            waiting=len(waiting),
            demand=used + max(prompts + expected, first),
            largest=self._largest_of(running),
            attainable=self._waiting.attainable,
            stalled=self._progress.stalled,
            prompts=prompts,
            longest=first,
            produced=sum(len(r.output_ids) for r in running),
            arrived=self.requests_arrived,
            tokens=self._answered,
        )

    def _expected_output(self, request: Any) -> int:
        """Tokens it will still produce; without history, SGLang's own guess at the start."""
        return self._lengths.remaining(
            len(request.output_ids),
            request.sampling_params.max_new_tokens,
            unknown=self._scheduler.new_token_ratio_tracker.init,
            route=request.routing_key or "",
        )

    def answered(self, requests: list[Any], before: int) -> None:
        """A step is applied: count the tokens of answers, of which they had `before`, and ends."""
        self._answered += max(0, sum(len(r.output_ids) for r in requests) - before)
        for request in requests:
            if request.finished():
                self.ended(request)

    def ended(self, request: Any) -> None:
        """Learn from a request that has come to its end how long answers get."""
        if not isinstance(request.finished_reason, FINISH_ABORT):
            limit = request.sampling_params.max_new_tokens
            self._lengths.ended(len(request.output_ids), limit, request.routing_key or "")

    def start_over(self) -> None:
        self._scheduler.start_over()

    def clear_slots(self) -> None:
        """No slot is taken any more, by a request or by the prefix cache."""
        scheduler = self._scheduler
        scheduler.tree_cache.reset()
        scheduler.req_to_token_pool.clear()
        self._allocator.rebuild(self._allocator.size, torch.empty(0, dtype=torch.int64))

    def reload(self, layers: Sequence[int]) -> None:
        self._runner.reload_layers(layers)

    # -- slots -----------------------------------------------------------------------------------

    def quiesce(self) -> None:
        self._scheduler.quiesce()

    def evict_cached(self, slots: int) -> None:
        taken = self._allocator.size - self._allocator.available_size()
        if taken > slots:
            self._scheduler.tree_cache.evict(EvictParams(num_tokens=taken - slots))

    def taken_slots(self) -> torch.Tensor:
        taken: torch.Tensor = self._allocator.taken()
        return taken.cpu()

    def watch_cache(self, log: CacheLog) -> None:
        tree = self._scheduler.tree_cache
        if self._prefixes is None and isinstance(tree, RadixCache):
            self._prefixes = PrefixWatch(tree, log)
        if self._prefixes is not None:
            self._prefixes.begin()

    def largest_request(self) -> int:
        return self._largest_of(self._scheduler.requests_with_slots())

    def _largest_of(self, requests: Sequence[Any]) -> int:
        chunked, page = self._scheduler.chunked_req, self._scheduler.page_size
        largest = max((in_the_end(r, page) for r in requests if r is not chunked), default=0)
        if chunked is None:
            return largest
        # Until its prompt is in the pool it cannot be retracted, so both have to fit.
        beside = in_blocks(chunked.seqlen, page) + page + largest
        return max(in_the_end(chunked, page), beside)

    def relocate(self, source: torch.Tensor, target: torch.Tensor) -> None:
        # As long as the stride, since rows keep stale slots of larger capacities behind their end.
        table = self._scheduler.req_to_token_pool.req_to_token
        moved = torch.arange(self._pool.store.stride, dtype=torch.int64, device=table.device)
        moved[source.to(table.device)] = target.to(table.device)
        for request in self._scheduler.requests_with_slots():
            row = table[request.req_pool_idx]
            row.copy_(moved[row.long()])
            request.prefix_indices = moved[request.prefix_indices]
        nodes = [self._scheduler.tree_cache.root_node]
        while nodes:
            node = nodes.pop()
            if len(node.value):
                node.value = moved[node.value]
            nodes.extend(node.children.values())
        self._allocator.rebuild(self._allocator.size, target)

    def set_capacity(self, slots: int) -> None:
        self._allocator.rebuild(slots, self._allocator.taken())
        scheduler = self._scheduler
        self._pool.size = slots
        scheduler.max_total_num_tokens = slots
        self._runner.max_total_num_tokens = slots
        for name in _CAPACITY_COPIES:
            # Frozen dataclasses; there is one capacity, and it has changed.
            object.__setattr__(getattr(scheduler, name), "max_total_num_tokens", slots)
        self._waiting.limit_prompts()

    def limit_requests(self, told: Attainable) -> None:
        self._waiting.limit(told)

    def request_table(self) -> torch.Tensor:
        table: torch.Tensor = self._scheduler.req_to_token_pool.req_to_token
        return table

    def bind_kv(self) -> None:
        self._pool.bind()

    def end(self) -> None:
        # SGLang's own way to end waits for seconds; nobody is served here any more.
        os.kill(os.getppid(), LEAVE_SIGNAL)

    # -- execution -------------------------------------------------------------------------------

    def enter_cooperation(self, owners: list[int]) -> None:
        self.forget_owners()
        self._allocator.prefer_low_slots(True)
        self._decoder.install(self._finish_forward)
        self._runner.hold_graphs()
        self.cooperating = True

    def leave_cooperation(self) -> None:
        self.forget_owners()
        self._allocator.prefer_low_slots(False)
        self._decoder.uninstall()
        self._runner.use_graphs()
        self.cooperating = False

    def begin(self, batch: Any) -> tuple[StageBatch, Hidden, Segment]:
        """Embed a scheduled batch: what the pipeline needs to take it through all stages."""
        resolve_forward_inputs(batch, self._scheduler.future_map)
        forward_batch = ForwardBatch.init_new(
            batch, self._runner, return_hidden_states_before_norm=False
        )
        positions = forward_batch.positions
        stage_batch = described(batch, self._scheduler.instance.instance)
        backend = self._runner.attn_backend

        def segment(layers: LayerRange, hidden: Hidden) -> Hidden:
            if self._stages.captured(stage_batch, layers):
                return self.run_stage(stage_batch, self.request_table(), 0, layers, hidden)
            with forward_context(ForwardContext(attn_backend=backend)):
                backend.init_forward_metadata(forward_batch)
                return self._decoder.layers(layers, positions, forward_batch, hidden)

        embedded = self._decoder.embed(
            forward_batch.input_ids, positions, forward_batch, forward_batch.input_embeds
        )
        return stage_batch, embedded, segment

    def finish(self, batch: Any, hidden: Hidden) -> Any:
        """SGLang's own step on a batch whose layers have run: norm, head, sampling."""
        self._arrived = hidden
        return self._scheduler.run_batch(batch)

    def _finish_forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: Any = None,
    ) -> Any:
        """Stands in for the decoder stack's forward while some of its layers are elsewhere."""
        hidden, self._arrived = self._arrived, None
        if hidden is None:
            raise InternalError("a forward pass outside the pipeline while layers are dropped")
        return self._decoder.finish(positions, forward_batch, hidden)

    @torch.no_grad()
    def run_stage(
        self, batch: StageBatch, table: torch.Tensor, base: int, layers: LayerRange, hidden: Hidden
    ) -> Hidden:
        return self._stages.run(batch, table, base, layers, hidden)

    def captured(self, batch: StageBatch) -> Sequence[LayerRange]:
        stages = self._stages
        return [layers for layers in stages.ranges if stages.captured(batch, layers)]

    def blank_hidden(self, tokens: int) -> Hidden:
        shape = tokens, self._runner.model_config.hidden_size
        # A GPU multiplies zeros with less power, and so at a higher clock.
        make = torch.zeros if self._torch_device.type == "cpu" else torch.randn
        return make(shape, dtype=self._runner.dtype, device=self._torch_device), None

    def forget_owners(self) -> None:
        self._stages.forget_owners()

    def settle(self) -> None:
        if self._torch_device.type == "cuda":
            torch.cuda.current_stream(self._torch_device).synchronize()

    def clock(self) -> float:
        if self._torch_device.type == "cpu" and self._scheduler.ranks.size == 1:
            # Of this thread: what other programs take of the core says nothing about the work.
            # Several ranks wait for one another, which is a part of it.
            return time.thread_time()
        self.settle()
        return time.perf_counter()

"""SGLang's scheduler as an instance of a KunServe cluster: owner and stage at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import torch
import zmq

# The class is taken from its module at definition: the hook that installs our subclass rewrites
# every imported name `Scheduler`, and a subclass must not inherit from itself.
from sglang.srt.managers import scheduler as upstream
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.utils import DynamicGradMode

from kunserve_sglang.core.cost_model import CostEstimate
from kunserve_sglang.core.errors import InternalError, PeerLost
from kunserve_sglang.core.instance_config import InstanceConfig, instance_from_environment
from kunserve_sglang.core.processes import divide_cpus
from kunserve_sglang.instance.agent.agent import Agent
from kunserve_sglang.instance.ranks.ranked import clock_of
from kunserve_sglang.instance.ranks.ranks import Fact, open_ranks
from kunserve_sglang.sglang_seam.assembly import build_agent, cost_model
from kunserve_sglang.sglang_seam.batches import no_requests, settled, with_slots
from kunserve_sglang.sglang_seam.containment import Containment
from kunserve_sglang.sglang_seam.cooperation import Cooperation
from kunserve_sglang.sglang_seam.engine import SglangEngine
from kunserve_sglang.sglang_seam.mixed_chunks import decoding_along
from kunserve_sglang.sglang_seam.model_runner import KunServeWorker
from kunserve_sglang.sglang_seam.penalties import counted
from kunserve_sglang.sglang_seam.progress import Progress
from kunserve_sglang.sglang_seam.resumed_requests import begin_with_outputs
from kunserve_sglang.sglang_seam.waiting import WaitingRequests

_IDLE_WAIT_MS = 500
_NO_ROOM_WAIT_MS = 50
"""For requests that wait while nothing runs: soon enough for one whose grammar is being built."""

_AWAKE = Fact("an event", msgspec.msgpack.Decoder(bool))


class _LayersLeft(Exception):
    """Leaves SGLang's loop at a step boundary: its batches can no longer run here alone."""


class KunServeScheduler(upstream.Scheduler):
    """Adds the agent to SGLang's loop: one call at each step boundary, one wait when idle."""

    instance: InstanceConfig
    agent: Agent
    running_batch: Any
    last_batch: Any
    chunked_req: Any
    _pending_chunked_abort_req: Any
    max_total_num_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        instance = instance_from_environment()
        if instance is None:
            raise InternalError("the KunServe scheduler was started outside an instance")
        self.instance = instance
        if instance.cpus:
            os.sched_setaffinity(0, instance.cpus)
            torch.set_num_threads(len(instance.cpus))
        super().__init__(*args, **kwargs)
        self._in_own_loop = False
        self.clock = clock_of(self.ranks)
        self.containment = Containment(self)
        self.waiting = WaitingRequests(self, self.containment)
        self.progress = Progress(self, self.waiting)
        self.engine = SglangEngine(self, self.waiting, self.progress)
        self.cooperation = Cooperation(self, self.engine, self.waiting, self.containment)
        self.costs = CostEstimate(cost_model(self, self.engine))
        self.agent = build_agent(self, self.engine)
        self._idle = self._build_idle_poller()

    def init_tp_model_worker(self) -> None:
        self.ranks = open_ranks(self.instance.data_socket, self.ps.tp_rank, self.ps.tp_size)
        if self.instance.cpus and self.ps.tp_size > 1:
            mine = divide_cpus(self.ps.tp_size)[self.ps.tp_rank]
            os.sched_setaffinity(0, mine)
            torch.set_num_threads(len(mine))
        self.tp_worker = KunServeWorker(
            server_args=self.server_args,
            gpu_id=self.ps.gpu_id,
            ps=self.ps,
            nccl_port=self.nccl_port,
            instance=self.instance,
        )
        self.ranks.connect()  # loading has a barrier: all ranks are there

    def init_req_max_new_tokens(self, req: Any) -> None:
        """Limit the answer by what there may be, not by what there happens to be now."""
        capacity, self.max_total_num_tokens = self.max_total_num_tokens, self.waiting.attainable
        try:
            super().init_req_max_new_tokens(req)
        finally:
            self.max_total_num_tokens = capacity

    def get_init_info(self) -> dict[str, Any]:
        """The launcher refuses to serve without our key: it proves that the plugin took effect."""
        return {**super().get_init_info(), "kunserve": type(self).__name__}

    def event_loop_normal(self) -> None:
        """Without overlap scheduling."""
        self._run(super().event_loop_normal)

    def event_loop_overlap(self) -> None:
        """With overlap scheduling, which pauses while layers are dropped."""
        self._run(super().event_loop_overlap)

    @DynamicGradMode()  # type: ignore[untyped-decorator]
    def _run(self, independent_loop: Callable[[], None]) -> None:
        """SGLang's own loop, for as long as all layers are here; else the cooperative one."""
        while not self.gracefully_exit:
            self._in_own_loop = not self.cooperating
            with contextlib.suppress(_LayersLeft), self.containment.contained():
                if self.cooperating:
                    self.cooperation.turn()
                else:
                    self.progress.moved()  # a transition may have taken its time
                    independent_loop()
            self._in_own_loop = False

    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        """First thing in every turn of the loop, with all results applied: the step boundary."""
        for request in recv_reqs:
            with self.containment.taking_in(request):
                super().process_input_requests([request])
        if not recv_reqs:
            super().process_input_requests([])
        self.progress.look()
        self.agent.poll()
        if self._in_own_loop and self.cooperating:
            raise _LayersLeft

    def handle_batch_generate_request(self, recv_req: Any) -> None:
        """Several of one client's: where one fails, the others are taken in."""
        for request in recv_req:
            with self.containment.taking_in(request):
                self.handle_generate_request(request)

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        begin_with_outputs(req, self.model_config.think_end_id)
        self.engine.requests_arrived += not is_retracted
        super()._add_request_to_queue(req, is_retracted)

    def run_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """One step; in cooperative mode its last part only."""
        with self.containment.doing("running a batch", batch.reqs):
            if self.cooperating:
                return super().run_batch(batch, *args, **kwargs)
            with self.agent.tracer.span("step", requests=len(batch.reqs)):
                return super().run_batch(batch, *args, **kwargs)

    def launch_batch_sample_if_needed(self, batch_result: Any, cur_batch: Any) -> Any:
        """The end of a step with a grammar, which SGLang samples once the one before is applied."""
        with self.containment.doing("sampling", cur_batch.reqs if cur_batch else []):
            return super().launch_batch_sample_if_needed(batch_result, cur_batch)

    def get_new_batch_prefill(self, running_batch: Any) -> Any:
        """Admit from the queue; who is too large for now stays there and holds up nobody."""
        along = decoding_along(self, running_batch)
        with self.waiting.admissible(running_batch):
            ahead = [r for r in (self.chunked_req, *self.waiting_queue, *along) if r is not None]
            with self.containment.doing("forming a batch", ahead):
                return super().get_new_batch_prefill(running_batch)

    def update_running_batch(self, batch: Any) -> Any:
        """Prepare a decode step for the loop that runs now: its batch may come from the other."""
        batch.enable_overlap = self.enable_overlap
        with self.containment.doing("preparing a step", batch.reqs):
            return super().update_running_batch(batch)

    @contextlib.contextmanager
    def _forward_isolation(self, batch: Any, *, overlap: bool) -> Iterator[None]:
        """Around each overlapped step, where its input is known."""
        with counted(batch), super()._forward_isolation(batch, overlap=overlap):
            yield

    def process_batch_result(self, batch: Any, result: Any) -> None:
        """Requests that end in this step teach how long answers get."""
        under_way = [r for r in batch.reqs if not r.finished()]
        before = sum(len(r.output_ids) for r in under_way)
        with self.containment.doing("applying the result of a batch", batch.reqs):
            super().process_batch_result(batch, result)
        self.containment.passed(batch)
        self.progress.moved()
        self.engine.answered(under_way, before)

    def on_idle(self) -> None:
        """Nothing to run; if somebody waits all the same, then not by spinning."""
        super().on_idle()
        if self._in_own_loop and self.waiting_queue and not self.requests_with_slots():
            self.agent.publish()
            self.wait_for_events(_NO_ROOM_WAIT_MS)

    def maybe_sleep_on_idle(self) -> None:
        """Wait for a request, a command or a peer's micro-batch instead of spinning."""
        self.agent.publish()
        self.wait_for_events(_IDLE_WAIT_MS)

    def wait_for_events(self, timeout_ms: int) -> bool:
        """Until a request, a command or a peer's packet is there; false if none came in time."""
        self.agent.before_sleep()
        return self.ranks.agree(_AWAKE, lambda: bool(self._idle.poll(timeout_ms)))

    def receive_requests(self) -> list[Any]:
        return list(self.request_receiver.recv_requests())

    @property
    def cooperating(self) -> bool:
        return self.engine.cooperating

    @property
    def paused(self) -> bool:
        return bool(self._engine_paused)

    def before_next_batch(self, running: Any) -> None:
        """What SGLang does before it looks for the next batch."""
        self.process_pending_chunked_abort()
        self._abort_on_waiting_timeout()
        self._abort_on_running_timeout(running)
        chunked = self.chunked_req
        if chunked is not None and chunked.extend_range.end > len(chunked.prefix_indices):
            self.stash_chunked_request(chunked)

    def pause_generation(self, recv_req: Any) -> None:
        """SGLang takes its running batch apart, so nothing of it may be in flight."""
        try:
            self.quiesce()
        except PeerLost as error:
            self.agent.leave_group(str(error))
        super().pause_generation(recv_req)

    def overlap(self, on: bool) -> None:
        """Whether results are applied one step later, as SGLang's overlap loop does."""
        self.enable_overlap = self.tp_worker.enable_overlap = on

    def quiesce(self) -> None:
        """Apply all results that are pending; all requests are then in the running batch."""
        self.cooperation.quiesce()
        while self.enable_overlap and self.result_queue:
            self.process_batch_result(*self.result_queue.popleft())
        if self.last_batch is not None and self.last_batch.forward_mode.is_extend():
            self.running_batch = settled(self.running_batch, self.last_batch, self.chunked_req)
        self.last_batch = None

    def start_over(self) -> None:
        """What is in flight never comes back: all requests go on from the tokens that they have."""
        requests = self.take_back_everything([])
        self.cooperation.forget()
        self.wait_again(requests)

    def take_back_everything(self, involved: list[Any]) -> list[Any]:
        """Leave no request with slots, in a batch or in the queue; returns all there were.

        Those with tokens come first. `involved`, of the step that failed, may be in no batch now.
        """
        found = {r.rid: r for r in (*self.requests_with_slots(), *involved, *self.waiting_queue)}
        self.engine.clear_slots()
        self.running_batch = no_requests()
        self.cooperation.discard()
        self.last_batch = self.chunked_req = self.cur_batch_for_debug = None
        self.waiting_queue: list[Any] = []
        if self.enable_overlap:
            self.result_queue.clear()
        return list(found.values())

    def wait_again(self, requests: list[Any]) -> None:
        """Put them into the queue, which is empty; those that held slots are to be run anew."""
        aborted, self._pending_chunked_abort_req = self._pending_chunked_abort_req, None
        for request in requests:
            if request.req_pool_idx is not None or request.kv is not None:
                request.req_pool_idx = request.kv = None
                request.reset_for_retract()
        self.waiting_queue = requests
        if aborted is not None:
            self.abort_request(AbortReq(rid=aborted.rid))

    def requests_with_slots(self) -> list[Any]:
        """All requests that hold token slots, each once."""
        pending = [batch for batch, _ in self.result_queue] if self.enable_overlap else []
        return with_slots((self.running_batch, self.last_batch, *pending), self.chunked_req)

    def _build_idle_poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        channels = self.ipc_channels
        sockets = [channels.recv_from_tokenizer, channels.recv_from_rpc, *self.agent.poll_handles]
        for socket in (s for s in sockets if s is not None):  # SGLang's are on rank 0 only
            poller.register(socket, zmq.POLLIN)
        return poller

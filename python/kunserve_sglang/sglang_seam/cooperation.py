"""The scheduler's turns while some of its layers are elsewhere.

SGLang's own loops run a batch and wait for it. Here an owner has several micro-batches on their
way, and is a stage for its peers besides. What SGLang sees as its running batch is the crowd of
all requests, ready or in flight; the tensors of the ready ones are kept apart.

A later micro-batch may build on an earlier one that is still in flight (the next chunk of a
prompt, a prefix just cached, a slot just freed), because every stage runs the micro-batches of one
owner in order (invariant 5).
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from kunserve_sglang.core.choices import MicroBatches
from kunserve_sglang.core.errors import InternalError, PeerLost, StageFailed
from kunserve_sglang.execution.formation import Outlook, look_ahead
from kunserve_sglang.instance.packets.request_table import rows_on_host
from kunserve_sglang.sglang_seam.batches import merged, no_requests, settled, split
from kunserve_sglang.sglang_seam.containment import Containment
from kunserve_sglang.sglang_seam.engine import SglangEngine
from kunserve_sglang.sglang_seam.launched import Launched, launching
from kunserve_sglang.sglang_seam.lookahead import batch_work, chunks_of, crowd_work, prompts_ahead
from kunserve_sglang.sglang_seam.scheduling import Scheduling
from kunserve_sglang.sglang_seam.waiting import WaitingRequests

_WAIT_MS = 100
_ROOM_WAIT_MS = 1
_KV_ALONG_BYTES = 8 << 20
"""Requests whose KV has to come along share a micro-batch up to about this size."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A micro-batch under way; nothing is expected of one without `batch`."""

    sequence: int
    batch: Any
    chunked: Launched | None
    """Its chunk of the prompt of which more chunks follow."""


class Cooperation:
    """Turns of the loop in cooperative mode; takes SGLang's batches over and gives them back."""

    def __init__(
        self,
        scheduler: Scheduling,
        engine: SglangEngine,
        waiting: WaitingRequests,
        containment: Containment,
    ) -> None:
        self._scheduler = scheduler
        self._engine = engine
        self._waiting = waiting
        self._containment = containment
        self._entered = False
        self._overlaps = False
        self._ready = no_requests()
        self._crowd = no_requests()
        self._flights: deque[_Flight] = deque()

    # -- entering and leaving --------------------------------------------------------------------

    def turn(self) -> bool:
        """Receive, collect, launch, serve; true if the result of an own batch was applied."""
        scheduler = self._scheduler
        began = scheduler.clock()
        scheduler.process_input_requests(scheduler.receive_requests())
        if not scheduler.cooperating:
            return False
        try:
            return self._work(began)
        except PeerLost as error:
            scheduler.agent.leave_group(str(error))
            return False

    def _work(self, began: float) -> bool:
        scheduler = self._scheduler
        collected = launched = False
        if not scheduler.paused and not scheduler.agent.abandoned:
            if not self._entered:
                self._enter()
            collected = self._collect()
            launched = self._launch()
        # Paused or not, peers depend on this stage.
        idle = not collected and not launched and not scheduler.agent.serve_one()
        busy_s = 0.0 if idle else scheduler.clock() - began
        if not scheduler.agent.move_pieces(busy_s) and idle:
            self._rest()
        return collected

    def quiesce(self) -> None:
        """Wait for everything in flight and give the batches back to SGLang.

        Peers are served meanwhile, since they may have to come to rest as well.
        """
        if not self._entered:
            return
        while self._flights:
            if not self._collect() and not self._scheduler.agent.serve_one(_WAIT_MS / 1e3):
                self._scheduler.agent.check_for_losses()
        self._scheduler.running_batch = self._ready
        self._ready = no_requests()
        self._scheduler.overlap(self._overlaps)
        self._entered = False

    def forget(self) -> None:
        """What is in flight never returns."""
        self._flights.clear()
        self._ready = self._crowd = no_requests()
        if self._entered:
            self._scheduler.overlap(self._overlaps)
        self._entered = False

    def discard(self) -> None:
        """Expect nothing of what is in flight, which comes back all the same."""
        self._flights = deque(_Flight(flight.sequence, None, None) for flight in self._flights)
        self._ready = no_requests()
        self._crowd = no_requests()
        if self._entered:
            self._scheduler.running_batch = self._crowd

    def _enter(self) -> None:
        scheduler = self._scheduler
        self._ready = scheduler.running_batch
        # The pipeline overlaps more than SGLang's loop could; a result is applied when it comes.
        self._overlaps = scheduler.enable_overlap
        scheduler.overlap(False)
        self._ready.chunked_req = None  # SGLang leaves it there; by now it may be one that decodes
        self._crowd = no_requests()
        scheduler.running_batch = self._crowd
        self._count()
        self._entered = True

    # -- own micro-batches -----------------------------------------------------------------------

    def _launch(self) -> bool:
        scheduler = self._scheduler
        with scheduler.agent.tracer.span("schedule"):
            outlook = self._outlook()
            batch = self._next_batch(outlook)
            if batch is None:
                self._count()
                return False
            scheduler.cur_batch_for_debug = batch
        with self._containment.doing("running a batch", batch.reqs):
            sequence = self._submit(batch, outlook)
        chunked = None if batch.chunked_req is None else Launched(batch.chunked_req)
        self._flights.append(_Flight(sequence, batch, chunked))
        self._count()
        return True

    def _submit(self, batch: Any, outlook: Outlook) -> int:
        agent = self._scheduler.agent
        with agent.tracer.span("schedule"):
            begun = self._engine.begin(batch)
        try:
            return agent.pipeline.submit(*begun, outlook.work_of(batch_work(batch)))
        except PeerLost:
            self._crowd.reqs = [*self._crowd.reqs, *batch.reqs]  # who holds slots is answered
            raise

    def _collect(self) -> bool:
        scheduler = self._scheduler
        try:
            returned = scheduler.agent.pipeline.collect()
        except StageFailed as error:
            self._failed(self._flights.popleft(), error)
            return False
        if returned is None:
            return False
        sequence, hidden = returned
        flight = self._flights.popleft()
        if flight.sequence != sequence:
            raise InternalError(f"micro-batch {sequence} came back before {flight.sequence}")
        if flight.batch is None:
            return False
        with scheduler.agent.tracer.span("finish", sequence=sequence):
            with flight.chunked.restored() if flight.chunked else contextlib.nullcontext():
                result = self._engine.finish(flight.batch, hidden)
                scheduler.process_batch_result(flight.batch, result)
            self._absorb(flight.batch)
        return True

    def _failed(self, flight: _Flight, error: StageFailed) -> None:
        """A stage could not run it; nothing more is expected of what was discarded before."""
        if flight.batch is not None:
            self._containment.contain("running a batch", flight.batch.reqs, error)

    def _absorb(self, batch: Any) -> None:
        """What is left of a batch that has come back is ready for its next step."""
        self._ready = settled(self._ready, batch, self._scheduler.chunked_req)
        self._count()

    def _outlook(self) -> Outlook:
        """All there is to do, ours and the peers', in predicted time."""
        scheduler = self._scheduler
        pipeline = scheduler.agent.pipeline
        return look_ahead(
            scheduler.costs,
            crowd_work(self._crowd),
            prompts_ahead(scheduler, self._waiting, pipeline.stages),
            pipeline.peers_work(),
            layers=self._engine.layer_count,
            stages=pipeline.stages,
            split=scheduler.instance.micro_batches is MicroBatches.LOOKAHEAD,
        )

    def _next_batch(self, outlook: Outlook) -> Any:
        """What SGLang would run next, as far as it is not in flight; None if nothing may start."""
        scheduler = self._scheduler
        if len(self._flights) >= outlook.count:
            return None
        in_flight = [flight.chunked for flight in self._flights if flight.chunked]
        with launching(in_flight), chunks_of(scheduler, outlook):
            scheduler.before_next_batch(self._crowd)
            plan = scheduler.get_new_batch_prefill(self._crowd)
        if plan.batch_to_run is not None:
            return plan.batch_to_run
        return self._next_decode(outlook.count)

    def _next_decode(self, count: int) -> Any:
        self._ready.filter_batch()
        if self._ready.is_empty():
            return None
        share = self._light(-(-len(self._crowd.reqs) // count))
        batch, self._ready = split(self._ready, share)
        if not batch.check_decode_mem():
            # Requests have to be retracted: SGLang must see all of them to choose.
            batch, self._ready = merged(batch, self._ready), no_requests()
            if self._flights:
                self._ready = batch
                return None
        batch = self._scheduler.update_running_batch(batch)
        return None if batch.is_empty() else batch

    def _light(self, share: int) -> int:
        """Of the first `share` ready requests, as many as have little KV to take along."""
        transfer = self._scheduler.agent.transfer
        if transfer is None:
            return share
        ready = self._ready.reqs[:share]
        rows = torch.tensor([request.req_pool_idx for request in ready])
        lengths = [request.seqlen - 1 for request in ready]
        live = self._engine.request_table()
        table, places = rows_on_host(live, rows, max(lengths))
        room = _KV_ALONG_BYTES
        for index, (place, length) in enumerate(zip(places.tolist(), lengths, strict=True)):
            room -= transfer.unsent(table[place, :length].long())
            if room < 0:
                return max(1, index)
        return share

    def _count(self) -> None:
        """Let SGLang see everybody who holds slots; it counts a chunked prompt by itself."""
        batches = [flight.batch for flight in self._flights if flight.batch is not None]
        flying = [r for batch in batches for r in batch.reqs if r is not batch.chunked_req]
        self._crowd.reqs = [*self._ready.reqs, *flying]

    # -- nothing to do ---------------------------------------------------------------------------

    def _rest(self) -> None:
        scheduler = self._scheduler
        if scheduler.agent.abandoned:
            scheduler.wait_for_events(_WAIT_MS)
            return
        scheduler.agent.pipeline.begin_idle()
        transfer = scheduler.agent.transfer
        wait_ms = _ROOM_WAIT_MS if transfer is not None and transfer.unfinished else _WAIT_MS
        if not scheduler.wait_for_events(wait_ms) and not self._flights:
            scheduler.on_idle()

"""The instance's own head: obeys the router at step boundaries, reports, works for its group.

The runtime calls `poll` at every step boundary; everything that changes the instance happens
inside that call. See `docs/member.md` for its states, `docs/structures.md` for the life of
a drop.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.messages import (
    Abort,
    Attainable,
    Commit,
    Leave,
    Lost,
    Prepare,
    Span,
    Status,
    ToInstance,
    Trace,
    Traced,
    Welcome,
)
from kunserve_sglang.core.sockets import PollHandle
from kunserve_sglang.instance.parts.cache_log import CacheLog
from kunserve_sglang.instance.parts.instance_parts import InstanceParts
from kunserve_sglang.instance.pipeline.group_work import GroupWork
from kunserve_sglang.instance.pipeline.pipeline import Pipeline
from kunserve_sglang.instance.transfer.transfer import Transfer
from kunserve_sglang.instance.transitions.machine import Machine
from kunserve_sglang.instance.transitions.participant import Participant
from kunserve_sglang.instance.transitions.table import MemberState

_STATUS_INTERVAL_S = 0.05

BUSY = ("own layers", "peer's layers", "finish", "schedule")
"""Spans in which a member of a group does something useful."""


class Agent:
    """What the runtime sees of one instance's part in its cluster."""

    def __init__(
        self,
        body: InstanceParts,
        *,
        peer_timeout_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`now` is when to report, in seconds, and no matter of all ranks."""
        self._body = body
        self._now = now
        self._speaks = body.rank == 0
        self._machine = Machine(body.alone(epoch=0), instance=body.instance)
        self._work = GroupWork(
            body, check_for_losses=self.check_for_losses, peer_timeout_s=peer_timeout_s
        )
        self._participant = Participant(
            body,
            self._machine,
            self._work,
            publish=lambda: self.publish(force=True),
            peer_timeout_s=peer_timeout_s,
        )
        self.tracer = self._work.tracer
        self._next_status = 0.0
        self._last_status: Status | None = None
        self._statuses = 0
        self._cache_log = CacheLog(body.instance)
        body.check_pages()

    @property
    def poll_handles(self) -> list[PollHandle]:
        """For a `zmq.Poller`: one is readable when a command or a peer's packet waits."""
        return [*self._body.control.poll_handles, *self._body.plane.poll_handles()]

    # -- called by the runtime -------------------------------------------------------------------

    def poll(self) -> None:
        """Step boundary: obey the router, report. Afterwards the mode may be another one."""
        try:
            while (message := self._next_command()) is not None:
                self._obey(message)
            self._participant.poll()
        except PeerLost as error:
            self.leave_group(str(error))
        self.publish()

    @property
    def pipeline(self) -> Pipeline:
        """Cooperative mode only; raises `InternalError` in independent mode."""
        return self._work.pipeline

    @property
    def transfer(self) -> Transfer | None:
        """What is on its way while this instance serves, if anything is."""
        return self._work.transfer

    @property
    def abandoned(self) -> bool:
        """Layers are missing, and there is no group to run with until the router has spoken."""
        return self._machine.state is MemberState.RECOVERING

    def leave_group(self, reason: str) -> None:
        """The group has come apart: nothing that is in flight will ever return."""
        self._participant.leave_group(reason)

    def check_for_losses(self) -> None:
        """For whoever waits for a peer of the group: raises `PeerLost` if that is in vain."""
        layout = self._machine.layout
        self._body.check_for_losses(layout.epoch, layout.ids)

    def serve_one(self, timeout_s: float = 0.0) -> bool:
        """Do what a packet of a peer asks for; false if none came in time."""
        return self._work.serve_one(timeout_s)

    def move_pieces(self, busy_s: float) -> bool:
        """Send and keep some of what is on its way, after `busy_s` of work; false if none was."""
        return self._work.move_pieces(busy_s)

    # -- reports ---------------------------------------------------------------------------------

    def publish(self, *, force: bool = False) -> None:
        """Send a status record, at most every 50 ms unless forced; rank 0 does it for all."""
        if self._speaks and (force or self._now() >= self._next_status):
            self._send_status(self.status())

    def before_sleep(self) -> None:
        """Nothing will happen for a while: leave the router with the latest figures."""
        if not self._speaks:
            return
        status = self.status()
        if status != self._last_status or self._cache_log.pending:
            self._send_status(status)

    def status(self) -> Status:
        body, work = self._body, self._work
        return Status(
            instance=body.instance,
            epoch=self._machine.layout.epoch,
            mode=self._machine.mode,
            layout=self._machine.layout,
            pages=body.pages(),
            load=body.engine.load(),
            counters={
                "micro_batches_own": work.counters.own,
                "micro_batches_foreign": work.counters.foreign,
                "busy_ms": int(1e3 * sum(s for n, s in self.tracer.seconds.items() if n in BUSY)),
                "bubble_ms": int(1e3 * work.counters.bubble_s),
                "stale_packets": work.stale_packets,
                "malformed_packets": work.malformed_packets,
                "malformed_commands": body.control.malformed,
            },
        )

    def _send_status(self, status: Status) -> None:
        self._next_status = self._now() + _STATUS_INTERVAL_S
        self._last_status = status
        self._statuses += 1
        numbered = msgspec.structs.replace(
            status, process=self._body.process, number=self._statuses
        )
        self._body.control.send(numbered)
        if (report := self._cache_log.report()) is not None:
            self._body.control.send(report)

    # -- commands --------------------------------------------------------------------------------

    def _next_command(self) -> ToInstance | None:
        put_off = self._participant.put_off
        return put_off.popleft() if put_off else self._body.control.receive()

    def _obey(self, message: ToInstance) -> None:
        if isinstance(message, Prepare | Commit | Abort | Lost):
            self._participant.obey(message)
        elif isinstance(message, Attainable):
            self._body.engine.limit_requests(message)
        elif self._speaks:
            self._obey_alone(message)

    def _obey_alone(self, message: ToInstance) -> None:
        """What one rank does for all, and no other needs to know of."""
        if isinstance(message, Trace):
            self._trace(message)
        elif isinstance(message, Leave):
            self._body.engine.end()
        elif isinstance(message, Welcome):
            self._body.engine.watch_cache(self._cache_log)

    def _trace(self, message: Trace) -> None:
        spans: list[Span] = []
        lost = 0
        if message.record:
            self.tracer.start()
        else:
            spans, lost = self.tracer.stop()
        self._body.control.send(Traced(call=message.call, spans=tuple(spans), lost=lost))

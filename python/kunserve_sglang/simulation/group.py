"""A cooperative group: micro-batches travel owner, stage 0, ..., stage k-1, owner (paper, 4.2).

Each member does one thing at a time, in the order of `sglang_seam.cooperation`: finish an own
micro-batch that came back, launch another, or run its layers for whoever's micro-batch arrived
first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from kunserve_sglang.core.layout import Layout
from kunserve_sglang.simulation.cluster_profile import Links
from kunserve_sglang.simulation.costs import Costs
from kunserve_sglang.simulation.forming import Formation, SimulatedBatch, SimulatedMember
from kunserve_sglang.simulation.host import SimulatedHost
from kunserve_sglang.simulation.owner import Owner


class Group:
    """All members of one layout, with a heap of events of their own.

    `due` is when the next of them happens, infinite while everybody is idle; `queued` as in `Solo`.
    """

    def __init__(
        self,
        layout: Layout,
        owners: Sequence[Owner],
        costs: Costs,
        host: SimulatedHost,
        links: Links,
        activation_bytes: int,
        *,
        split: bool = True,
    ) -> None:
        self.due = math.inf
        self.queued = math.inf
        self.stopping = False
        self._costs = costs
        self._host = host
        self._hop_s = links.hop_ms / 1e3
        self._token_s = activation_bytes / links.activations_bytes_per_s
        self._events: list[tuple[float, int, SimulatedMember, SimulatedBatch | None]] = []
        self._sequence = 0
        by_number = {owner.number: owner for owner in owners}
        self._members = [
            SimulatedMember(by_number[m.instance], position, len(m.layers))
            for position, m in enumerate(layout.members)
        ]
        self._formation = Formation(self._members, costs, split=split)
        self._of = {m.owner.number: m for m in self._members}

    @property
    def resting(self) -> bool:
        """Nothing in flight anywhere."""
        return not self._events

    def steps_done(self, now: float) -> int:  # noqa: ARG002 (as `Solo`)
        """Steps that owners have not accounted for: none, every micro-batch counts at once."""
        return 0

    def arrived(self, number: int, now: float) -> None:
        """A request was added to the queue of owner `number`."""
        self._turn(self._of[number], now)
        self._set_due()

    def stop(self, now: float) -> None:  # noqa: ARG002 (as `Solo`)
        """Launch nothing any more; `resting` when all that is in flight has come back."""
        self.stopping = True

    def resume(self, now: float) -> None:
        self.stopping = False
        for member in self._members:
            self._turn(member, now)
        self._set_due()

    def fire(self, now: float) -> Owner | None:
        """The next event. Returns whose load may have changed, if anybody's."""
        _, _, member, arriving = heapq.heappop(self._events)
        if arriving is not None:
            if arriving.position == len(self._members):
                member.returned.append(arriving)
            else:
                member.inbox.append(arriving)
        else:
            self._done(member, now)
        own = member.doing == "finish"
        self._turn(member, now)
        self._set_due()
        # Slots are taken at a launch and given back at the end; a launch reports with the next.
        return member.owner if own else None

    def _set_due(self) -> None:
        self.due = self._events[0][0] if self._events else math.inf

    def _push(self, at: float, member: SimulatedMember, arriving: SimulatedBatch | None) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (at, self._sequence, member, arriving))

    # -- what a member does next -----------------------------------------------------------------

    def _turn(self, member: SimulatedMember, now: float) -> None:
        if member.busy:
            return
        if member.returned:
            batch = member.returned.popleft()
            rows = len(batch.pieces) or len(batch.jobs)
            self._do(member, "finish", batch, now, self._costs.finish(rows))
            return
        launched = None if self.stopping else self._formation.next(member, now)
        if launched is not None:
            member.flights += 1
            seconds = self._costs.launch(launched.tokens)
            if member.position == 0:  # the own layers come first
                seconds += member.layers * launched.seconds
                launched.position = 1
            self._do(member, "pass", launched, now, seconds)
        elif member.inbox:
            batch = member.inbox.popleft()
            batch.position += 1
            seconds = self._costs.stage + member.layers * batch.seconds
            self._do(member, "pass", batch, now, seconds)
        elif not member.flights and not member.owner.running:
            member.owner.rest()

    def _do(
        self, member: SimulatedMember, doing: str, batch: SimulatedBatch, now: float, seconds: float
    ) -> None:
        member.busy = True
        member.doing = doing
        member.batch = batch
        lasts = self._host.begin(member.owner.number, now, seconds)
        self._push(now + lasts, member, None)

    def _done(self, member: SimulatedMember, now: float) -> None:
        batch, member.batch, member.busy = member.batch, None, False
        assert batch is not None
        self._host.end(member.owner.number)
        if member.doing == "pass":
            self._pass_on(member, batch, now)
            return
        member.flights -= 1
        owner = member.owner
        self._host.delivered(now, len(batch.pieces) or len(batch.jobs))
        if batch.pieces:
            owner.decoding.ready.extend(owner.prefilled(batch.pieces, now))
        else:
            owner.decoded(batch.jobs, now)

    def _pass_on(self, member: SimulatedMember, batch: SimulatedBatch, now: float) -> None:
        last = batch.position == len(self._members)
        target = batch.owner if last else self._members[batch.position]
        if target is member:
            (member.returned if last else member.inbox).append(batch)
            return
        self._push(now + self._hop_s + self._token_s * batch.tokens, target, batch)

"""An independent instance: one batch after the other, in SGLang's order.

A run of decode steps is one event. It ends when a request finishes or slots run out, and is cut
short at the next step boundary when an arrival could be admitted or a transition wants to begin.
On a host whose cores are shared every step is an event, because the next one may be slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from kunserve_sglang.simulation.admission import Piece
from kunserve_sglang.simulation.costs import Costs
from kunserve_sglang.simulation.host import SimulatedHost
from kunserve_sglang.simulation.owner import Owner

IDLE = math.inf


class Solo:
    """Runs one owner. `due` is when something happens next, infinite while it is idle.

    `queued` belongs to the cluster's loop: the time it last put into its own heap.
    """

    __slots__ = (
        "_costs",
        "_host",
        "_pieces",
        "_shrunk",
        "_start",
        "_steps",
        "due",
        "owner",
        "queued",
        "stopping",
    )

    def __init__(self, owner: Owner, costs: Costs, host: SimulatedHost) -> None:
        self.owner = owner
        self.due = IDLE
        self.queued = IDLE
        self.stopping = False
        self._costs = costs
        self._host = host
        self._pieces: list[Piece] = []
        self._steps = 0
        self._start = 0.0
        self._shrunk = False

    @property
    def busy(self) -> bool:
        return self.due != IDLE

    @property
    def resting(self) -> bool:
        """At a step boundary, with nothing begun."""
        return not self.busy

    def arrived(self, number: int, now: float) -> None:  # noqa: ARG002 (as `Group`)
        """A request was added to the owner's queue."""
        if not self.busy:
            if not self.stopping:
                self._next(now)
        elif self._steps > 1 and self.owner.may_admit:
            self._cut(now)

    def stop(self, now: float) -> None:
        """Come to rest at the next step boundary: `due`, or now if idle."""
        self.stopping = True
        if self.busy and self._steps > 1:
            self._cut(now)

    def resume(self, now: float) -> None:
        self.stopping = False
        if not self.busy:
            self._next(now)

    def fire(self, now: float) -> Owner:
        """What was due is done; begin the next batch. Returns whose load has changed."""
        owner = self.owner
        self._host.end(owner.number)
        pieces = self._pieces
        if pieces:
            self._host.delivered(now, len(pieces))
            owner.decoding.begin(owner.prefilled(pieces, now))
            self._pieces = []
        elif self._steps:
            self._host.delivered(now, self._steps * owner.count)
            # SGLang sees that a batch has shrunk when it prepares the next decode step.
            self._shrunk |= owner.advance(self._steps, now)
            self._steps = 0
        self.due = IDLE
        if not self.stopping:
            self._next(now)
            if self._costs.delayed and self.busy:
                self._delay(pieces, now)
        return owner

    def _delay(self, pieces: Iterable[Piece], now: float) -> None:
        """Their first tokens leave when the step that has begun is through."""
        owner = self.owner
        if self._steps > 1:
            seconds = self._costs.decode_run(owner.count, owner.context, 1)
        else:
            seconds = self.due - now
        for job, _, _ in pieces:
            if job.first == now:
                job.first += seconds

    def steps_done(self, now: float) -> int:
        """Decode steps of the current run that are complete."""
        if self._steps <= 1:
            return 0
        owner = self.owner
        done = self._costs.steps_within(owner.count, owner.context, now - self._start)
        return min(done, self._steps)

    def _cut(self, now: float) -> None:
        owner = self.owner
        elapsed = now - self._start
        steps = self._costs.steps_within(owner.count, owner.context, elapsed)
        if self._costs.decode_run(owner.count, owner.context, steps) < elapsed or not steps:
            steps += 1
        if steps < self._steps:
            self._steps = steps
            self.due = self._start + self._costs.decode_run(owner.count, owner.context, steps)

    def _next(self, now: float) -> None:
        owner = self.owner
        if self._shrunk and not owner.count:
            owner.full = self._shrunk = False
        pieces = owner.admit(owner.limits.chunked_prefill_size, now)
        self._start = now
        if pieces:
            self._pieces = pieces
            self._due_after(self._costs.prefill(pieces))
        elif owner.count:
            self._decode(now)
        else:
            owner.rest()
            self.due = IDLE

    def _decode(self, now: float) -> None:
        owner = self.owner
        if self._shrunk:
            owner.full = self._shrunk = False
        steps = owner.most_steps()
        if not steps:
            owner.retract()
            steps = owner.most_steps() if owner.count else 0
            if not steps:
                self._next(now)
                return
        if owner.may_admit or self._host.shared:
            steps = 1  # there is room again: the next batch may be a prefill
        self._steps = steps
        self._due_after(self._costs.decode_run(owner.count, owner.context, steps))

    def _due_after(self, seconds: float) -> None:
        """What has begun takes `seconds` of a core."""
        self.due = self._start + self._host.begin(self.owner.number, self._start, seconds)

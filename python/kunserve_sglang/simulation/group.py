"""A cooperative group: micro-batches travel owner, stage 0, ..., stage k-1, owner (section 4.2).

Each member does one thing at a time, in the order of `sglang_seam.cooperation`: finish an own
micro-batch that came back, launch another, or run its layers for whoever's micro-batch arrived
first. How many micro-batches and how long is `policy.formation.look_ahead`'s answer, as in the
real thing.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence

from kunserve_sglang.layout import Layout
from kunserve_sglang.policy.cost_model import Chunk, Work
from kunserve_sglang.policy.formation import Outlook, PeerWork, look_ahead
from kunserve_sglang.simulation.costs import Costs, work_of
from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.owner import Owner, Piece
from kunserve_sglang.simulation.profile import Links

_SILENT_ROUNDS = 3
"""As in `instance.pipeline`: an owner that has sent nothing for so many rounds has no work."""

_SAME_CONTEXT = 0.01
"""Predictions are no better than that."""


class _MicroBatch:
    """`seconds` is its time in one decoder layer; `jobs` decode, or `pieces` are prompts."""

    __slots__ = ("jobs", "owner", "pieces", "position", "seconds", "tokens", "work")

    def __init__(
        self, owner: _Member, pieces: list[Piece], jobs: list[Job], work: Work, seconds: float
    ) -> None:
        self.owner = owner
        self.pieces = pieces
        self.jobs = jobs
        self.work = work
        self.seconds = seconds
        self.tokens = work.decodes + sum(c.tokens for c in work.chunks)
        self.position = 0


class _Member:
    """One instance of the group: an owner, and a stage with `layers` layers at `position`."""

    __slots__ = (
        "announced",
        "batch",
        "busy",
        "doing",
        "flights",
        "inbox",
        "launched_at",
        "layers",
        "outlook",
        "outlook_context",
        "outlook_for",
        "owner",
        "position",
        "returned",
    )

    def __init__(self, owner: Owner, position: int, layers: int) -> None:
        self.owner = owner
        self.position = position
        self.layers = layers
        self.inbox: deque[_MicroBatch] = deque()
        self.returned: deque[_MicroBatch] = deque()
        self.flights = 0
        self.busy = False
        self.doing = ""
        self.batch: _MicroBatch | None = None
        self.announced: PeerWork | None = None
        self.launched_at = -math.inf
        self.outlook: Outlook | None = None
        self.outlook_for: tuple[object, ...] = ()
        self.outlook_context = 0


class Group:
    """All members of one layout, with a heap of events of their own.

    `due` is when the next of them happens, infinite while everybody is idle; `queued` as in `Solo`.
    """

    def __init__(
        self,
        layout: Layout,
        owners: Sequence[Owner],
        costs: Costs,
        links: Links,
        activation_bytes: int,
        *,
        split: bool = True,
    ) -> None:
        self.due = math.inf
        self.queued = math.inf
        self.stopping = False
        self._costs = costs
        self._hop_s = links.hop_ms / 1e3
        self._token_s = activation_bytes / links.activations_bytes_per_s
        self._split = split
        self._events: list[tuple[float, int, _Member, _MicroBatch | None]] = []
        self._sequence = 0
        by_number = {owner.number: owner for owner in owners}
        self._members = [
            _Member(by_number[m.instance], position, len(m.layers))
            for position, m in enumerate(layout.members)
        ]
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

    def _push(self, at: float, member: _Member, arriving: _MicroBatch | None) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (at, self._sequence, member, arriving))

    # -- what a member does next -----------------------------------------------------------------

    def _turn(self, member: _Member, now: float) -> None:
        if member.busy:
            return
        if member.returned:
            batch = member.returned.popleft()
            rows = len(batch.pieces) or len(batch.jobs)
            self._do(member, "finish", batch, now + self._costs.finish(rows))
            return
        launched = None if self.stopping else self._form(member, now)
        if launched is not None:
            member.flights += 1
            seconds = self._costs.launch(launched.tokens)
            if member.position == 0:  # the own layers come first
                seconds += member.layers * launched.seconds
                launched.position = 1
            self._do(member, "pass", launched, now + seconds)
        elif member.inbox:
            batch = member.inbox.popleft()
            batch.position += 1
            seconds = self._costs.stage + member.layers * batch.seconds
            self._do(member, "pass", batch, now + seconds)
        elif not member.flights and not member.owner.running:
            member.owner.rest()

    def _do(self, member: _Member, doing: str, batch: _MicroBatch, until: float) -> None:
        member.busy = True
        member.doing = doing
        member.batch = batch
        self._push(until, member, None)

    def _done(self, member: _Member, now: float) -> None:
        batch, member.batch, member.busy = member.batch, None, False
        assert batch is not None
        if member.doing == "pass":
            self._pass_on(member, batch, now)
            return
        member.flights -= 1
        owner = member.owner
        if batch.pieces:
            owner.ready.extend(owner.prefilled(batch.pieces, now))
        else:
            owner.decoded(batch.jobs, now)

    def _pass_on(self, member: _Member, batch: _MicroBatch, now: float) -> None:
        last = batch.position == len(self._members)
        target = batch.owner if last else self._members[batch.position]
        if target is member:
            (member.returned if last else member.inbox).append(batch)
            return
        self._push(now + self._hop_s + self._token_s * batch.tokens, target, batch)

    # -- own micro-batches -----------------------------------------------------------------------

    def _form(self, member: _Member, now: float) -> _MicroBatch | None:
        """The owner's next micro-batch; None if nothing may start."""
        owner = member.owner
        if not (owner.ready or owner.may_admit):
            return None
        outlook = self._outlook(member, now)
        if member.flights >= outlook.count:
            return None
        limit = min(owner.limits.chunked_prefill_size, max(1, outlook.chunk_tokens))
        pieces = owner.admit(limit)
        jobs = [] if pieces else self._decodes(member, outlook.count)
        if pieces:
            work = work_of(pieces)
        elif jobs:
            work = Work(decodes=len(jobs), context=sum(job.prompt + job.produced for job in jobs))
        else:
            return None
        member.announced = outlook.work_of(work)
        member.launched_at = now
        seconds = member.announced.batch_ms / outlook.layers / 1e3
        return _MicroBatch(member, pieces, jobs, work, seconds)

    def _decodes(self, member: _Member, count: int) -> list[Job]:
        owner = member.owner
        if not owner.ready:
            return []
        share = -(-owner.count // count)
        batch = owner.take_ready(share)
        if not batch and not member.flights:
            owner.retract()
            batch = owner.take_ready(share)
        return batch

    def _outlook(self, member: _Member, now: float) -> Outlook:
        """Made anew when the own work has changed; what peers do since then can wait so long.

        Decoding requests grow by a token a step, which changes little: a few of them do not count.
        """
        owner = member.owner
        chunked = owner.chunked.computed if owner.chunked is not None else 0
        situation = (owner.count, chunked, len(owner.waiting), owner.full)
        grown = abs(owner.context - member.outlook_context) > _SAME_CONTEXT * owner.context
        if member.outlook is None or grown or member.outlook_for != situation:
            member.outlook = self._look_ahead(member, now)
            member.outlook_for = situation
            member.outlook_context = owner.context
        return member.outlook

    def _look_ahead(self, member: _Member, now: float) -> Outlook:
        peers = [
            p.announced
            for p in self._members
            if p is not member and p.announced is not None and not self._silent(p, now)
        ]
        owner = member.owner
        prompts = _prompts_ahead(owner, len(self._members))
        return look_ahead(
            self._costs.estimate,
            Work(decodes=owner.count, context=owner.context),
            prompts,
            peers,
            layers=self._costs.layers,
            stages=len(self._members),
            split=self._split,
        )

    def _silent(self, member: _Member, now: float) -> bool:
        rounds = sum(p.announced.round_ms for p in self._members if p.announced is not None)
        return now - member.launched_at >= _SILENT_ROUNDS * rounds / 1e3


def _prompts_ahead(owner: Owner, chunks: int) -> list[Chunk]:
    """As `sglang_seam.lookahead.prompts_ahead`."""
    limit = owner.limits.chunked_prefill_size
    found: list[Chunk] = []
    room = chunks * limit
    job = owner.chunked
    if job is not None:
        left = min(job.known - job.computed, limit)
        if left > 0:
            found.append(Chunk(job.computed, left))
            room -= left
    if owner.full:
        return found
    for job in owner.waiting:
        if room <= 0:
            break
        tokens = min(job.known, limit)
        found.append(Chunk(0, tokens))
        room -= tokens
    return found

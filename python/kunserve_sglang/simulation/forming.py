"""What owners of a group send round next, by `execution.formation` as in the real thing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

from kunserve_sglang.core.cost_model import Chunk, Work
from kunserve_sglang.execution.formation import Outlook, PeerWork, chunks_ahead, look_ahead
from kunserve_sglang.simulation.admission import Piece
from kunserve_sglang.simulation.costs import Costs, work_of
from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.owner import Owner

_SILENT_ROUNDS = 3
"""As in `instance.pipeline`: an owner that has sent nothing for this many rounds has no work."""

_SAME_CONTEXT = 0.01
"""Predictions are no better than that."""


class SimulatedBatch:
    """`seconds` is its time in one decoder layer; `jobs` decode, or `pieces` are prompts."""

    __slots__ = ("jobs", "owner", "pieces", "position", "seconds", "tokens")

    def __init__(
        self,
        owner: SimulatedMember,
        pieces: list[Piece],
        jobs: list[Job],
        tokens: int,
        seconds: float,
    ) -> None:
        self.owner = owner
        self.pieces = pieces
        self.jobs = jobs
        self.seconds = seconds
        self.tokens = tokens
        self.position = 0


class SimulatedMember:
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
        self.inbox: deque[SimulatedBatch] = deque()
        self.returned: deque[SimulatedBatch] = deque()
        self.flights = 0
        self.busy = False
        self.doing = ""
        self.batch: SimulatedBatch | None = None
        self.announced: PeerWork | None = None
        self.launched_at = -math.inf
        self.outlook: Outlook | None = None
        self.outlook_for: tuple[object, ...] = ()
        self.outlook_context = 0


class Formation:
    """Forms the micro-batches of all members of a group."""

    def __init__(self, members: Sequence[SimulatedMember], costs: Costs, *, split: bool) -> None:
        self._members = members
        self._costs = costs
        self._split = split

    def next(self, member: SimulatedMember, now: float) -> SimulatedBatch | None:
        """The owner's next micro-batch; None if nothing may start."""
        owner = member.owner
        if not (owner.decoding.ready or owner.may_admit):
            return None
        outlook = self._outlook(member, now)
        if member.flights >= outlook.count:
            return None
        limit = min(owner.limits.chunked_prefill_size, max(1, outlook.chunk_tokens))
        pieces = owner.admit(limit, now)
        jobs = [] if pieces else self._decodes(member, outlook.count)
        if pieces:
            work = work_of(pieces)
            tokens = sum(take for _, _, take in pieces)
        elif jobs:
            tokens = len(jobs)
            work = Work(decodes=len(jobs), context=sum(job.prompt + job.produced for job in jobs))
        else:
            return None
        member.announced = outlook.work_of(work)
        member.launched_at = now
        seconds = member.announced.batch_ms / outlook.layers / 1e3
        return SimulatedBatch(member, pieces, jobs, tokens, seconds)

    def _decodes(self, member: SimulatedMember, count: int) -> list[Job]:
        owner = member.owner
        if not owner.decoding.ready:
            return []
        share = -(-owner.count // count)
        batch = owner.take_ready(share)
        if not batch and not member.flights:
            owner.retract()
            batch = owner.take_ready(share)
        return batch

    def _outlook(self, member: SimulatedMember, now: float) -> Outlook:
        """Made anew when the own work has changed; until then, changes at peers can wait.

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

    def _look_ahead(self, member: SimulatedMember, now: float) -> Outlook:
        peers = [
            p.announced
            for p in self._members
            if p is not member and p.announced is not None and not self._silent(p, now)
        ]
        owner = member.owner
        prompts = chunks_ahead(
            _prompts_left(owner),
            limit=owner.limits.chunked_prefill_size,
            count=len(self._members),
        )
        return look_ahead(
            self._costs.estimate,
            Work(decodes=owner.count, context=owner.context),
            prompts,
            peers,
            layers=self._costs.layers,
            stages=len(self._members),
            split=self._split,
        )

    def _silent(self, member: SimulatedMember, now: float) -> bool:
        rounds = sum(p.announced.round_ms for p in self._members if p.announced is not None)
        return now - member.launched_at >= _SILENT_ROUNDS * rounds / 1e3


def _prompts_left(owner: Owner) -> Iterator[Chunk]:
    """As in `sglang_seam.lookahead`."""
    job = owner.chunked
    if job is not None:
        yield Chunk(job.computed, job.known - job.computed)
    if not owner.full:
        for waiting in owner.waiting:
            yield Chunk(0, waiting.known)

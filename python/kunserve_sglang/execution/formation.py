"""Lookahead batch formation: micro-batches of equal predicted time (paper section 4.4).

The paper splits everything that is queued in halves of equal time until the smallest size that
still fills the device. Here micro-batches leave one by one, so the same is asked anew each time:
in how many equal parts does this owner's work go round, and how long may the next part take?

A pipeline of k stages has no bubbles if no micro-batch takes longer than a k-th of all the work of
a round; owners know one another's work from the micro-batches that pass by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from kunserve_sglang.core.cost_model import Chunk, CostEstimate, Work

_WORTH_IT = 0.97
"""Another split must shorten a round by this much: predictions are no better than that."""

_FIXED_SHARE = 0.25
"""A micro-batch is never cut so small that its fixed cost is more than this part of it."""


class PeerWork(msgspec.Struct, frozen=True, kw_only=True):
    """What another owner of the group has going round, in ms through all stages.

    `batch_ms` is one of its micro-batches, `round_ms` all of its work.
    """

    batch_ms: float
    round_ms: float


def split_count(
    own_ms: float, peers: Sequence[PeerWork], *, fixed_ms: float, stages: int, most: int
) -> int:
    """In how many micro-batches to send `own_ms` of work round, at least 1 and at most `most`.

    Each split costs `fixed_ms` more and pays if otherwise stages would wait for this owner.
    """
    best, best_round = 1, float("inf")
    for count in range(1, max(1, most) + 1):
        work = own_ms + (count - 1) * fixed_ms
        everybody = work + sum(p.round_ms for p in peers)
        slowest = max([work / count, *(p.batch_ms for p in peers)])
        predicted = max(everybody / stages, slowest)
        if predicted < _WORTH_IT * best_round:
            best, best_round = count, predicted
    return best


def chunk_target_ms(
    own_ms: float, peers: Sequence[PeerWork], *, fixed_ms: float, stages: int
) -> float:
    """How long the next prefill chunk may take, in ms through all stages.

    All owners come to the same length: what everybody has going round, in as many equal parts as
    there are stages for each owner. So in a backlog of prompts chunks stay whole, and beside peers
    that only decode they are cut; but never shorter than what comes between them anyway.
    """
    everybody = own_ms + sum(p.round_ms for p in peers)
    wanted = everybody / (stages * (1 + len(peers)))
    wanted = max(wanted, min((p.batch_ms for p in peers), default=0.0))
    return max(wanted, fixed_ms / _FIXED_SHARE)


class Outlook(msgspec.Struct, frozen=True, kw_only=True):
    """The answer for one owner at one moment; times are predicted ms through all stages.

    `count`: how many micro-batches to have in flight. `chunk_tokens`: the longest prefill chunk.
    `round_ms`: all of the owner's work. `costs`, `layers`: what the prediction is made with.
    """

    count: int
    chunk_tokens: int
    round_ms: float
    costs: CostEstimate
    layers: int

    def work_of(self, work: Work) -> PeerWork:
        """What to tell the peers of a micro-batch."""
        return PeerWork(batch_ms=self.layers * self.costs.predict(work), round_ms=self.round_ms)


def chunks_ahead(prompts: Iterable[Chunk], *, limit: int, count: int) -> list[Chunk]:
    """The chunks that come first of `prompts`, each given as all that is left of it.

    One a prompt, of at most `limit` tokens, until there is enough for `count` such chunks.
    """
    found: list[Chunk] = []
    room = count * limit
    for prompt in prompts:
        if room <= 0:
            break
        if prompt.tokens > 0:
            chunk = prompt if prompt.tokens <= limit else Chunk(prompt.prefix, limit)
            found.append(chunk)
            room -= chunk.tokens
    return found


def look_ahead(
    costs: CostEstimate,
    decodes: Work,
    prompts: Sequence[Chunk],
    peers: Sequence[PeerWork],
    *,
    layers: int,
    stages: int,
    split: bool = True,
) -> Outlook:
    """Plan for an owner that decodes `decodes` and has `prompts` (cut by the chunk limit) ahead.

    Without `split`, one micro-batch at a time, as large as it comes.
    """
    own_ms = layers * (costs.predict(decodes) + costs.predict(Work(chunks=tuple(prompts))))
    fixed_ms = layers * costs.fixed_ms(prefill=bool(prompts))
    tokens = sum(c.tokens for c in prompts)
    if not split:
        return Outlook(count=1, chunk_tokens=tokens, round_ms=own_ms, costs=costs, layers=layers)
    most = min(decodes.decodes + tokens, 2 * stages)
    count = split_count(own_ms, peers, fixed_ms=fixed_ms, stages=stages, most=most)
    # With a long prefix, a single token costs nearly as much as many: that is a fixed cost too.
    prefix = prompts[0].prefix if prompts else 0
    least_ms = layers * costs.predict(Work(chunks=(Chunk(prefix, 1),)))
    target = chunk_target_ms(own_ms, peers, fixed_ms=least_ms, stages=stages)
    chunk = costs.chunk_tokens(prefix, target / layers, tokens)
    # In equal parts: a remainder of a few tokens would cost nearly as much as a whole chunk.
    chunk = -(-tokens // max(1, round(tokens / chunk)))
    return Outlook(count=count, chunk_tokens=chunk, round_ms=own_ms, costs=costs, layers=layers)

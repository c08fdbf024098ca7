"""What a pipeline keeps of micro-batches: its own until they are back, others' by their owner."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.execution.formation import PeerWork
from kunserve_sglang.instance.packets import wire
from kunserve_sglang.instance.packets.request_table import MirroredRows
from kunserve_sglang.instance.parts.engine import Hidden, Segment, StageBatch
from kunserve_sglang.transport.data import Malformed

_NO_WORK = PeerWork(batch_ms=0.0, round_ms=0.0)


@dataclass(slots=True)
class PipelineCounters:
    """Since start: micro-batches of this owner and of others, and time lost in bubbles.

    A bubble is time in which this stage waited although the group had a micro-batch on its way.
    """

    own: int = 0
    foreign: int = 0
    bubble_s: float = 0.0


@dataclass(slots=True)
class OwnBatch:
    """`described`: what of its description does not fit the header (`packing.pack`).

    `reads`: slots that its requests hold, noted while KV is on its way.
    """

    header: wire.MicroBatch
    batch: StageBatch
    described: list[torch.Tensor]
    segment: Segment
    reads: torch.Tensor | None
    result: Hidden | None = None


@dataclass(slots=True)
class Peer:
    """What an owner has told of its table, and of its work."""

    mirror: MirroredRows
    sequence: int = -1
    arrived: float = 0.0
    work: PeerWork = _NO_WORK

    def follows(self, header: wire.MicroBatch, now: float) -> None:
        """Note the next one, and what it says of its owner's work (invariant 5).

        Raises `Malformed` for one that has been before, and `PeerLost` after a gap: what is missing
        will never come, and this owner's requests cannot go on here.
        """
        if header.sequence <= self.sequence:
            raise Malformed(f"micro-batch {header.sequence} after {self.sequence}")
        if header.sequence > self.sequence + 1:
            raise PeerLost(
                f"micro-batch {header.sequence} of instance {header.owner} came after "
                f"{self.sequence}"
            )
        self.sequence, self.arrived = header.sequence, now
        self.work = PeerWork(batch_ms=header.cost_ms, round_ms=header.round_ms)

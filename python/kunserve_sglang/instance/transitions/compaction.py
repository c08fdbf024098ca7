"""Which slots an owner has taken, and where they go when its capacity shrinks. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kunserve_sglang.core.errors import InternalError


@dataclass(frozen=True, slots=True)
class SlotChange:
    """The taken slots of an owner: `source[i]` becomes `target[i]` (equal unless compacted)."""

    source: torch.Tensor
    target: torch.Tensor
    block_slots: int = 1

    @property
    def highest(self) -> int:
        """The least capacity that has them all."""
        return int(self.target.max()) - self.block_slots + 1 if len(self.target) else 0

    @property
    def moved(self) -> int:
        return int((self.source != self.target).sum())


def compact(taken: torch.Tensor, capacity: int, block_slots: int = 1) -> SlotChange:
    """Move blocks of slots above `capacity` to the lowest free ones.

    `taken` are whole blocks, ascending, and stay whole: their tokens keep their places in them.
    Raises `InternalError` if there are too many.
    """
    if block_slots > 1:
        places = compact(taken[::block_slots] // block_slots, capacity // block_slots).target
        return SlotChange(taken, slots_of(places, block_slots), block_slots)
    high = taken > capacity
    low = taken[~high]
    used = torch.zeros(capacity + 1, dtype=torch.bool)
    used[low] = True
    used[0] = True
    room = torch.nonzero(~used).flatten()[: int(high.sum())]
    if len(room) < int(high.sum()):
        raise InternalError(f"{len(taken)} slots or blocks cannot be compacted into {capacity}")
    target = taken.clone()
    target[high] = room
    return SlotChange(taken, target)


def slots_of(blocks: torch.Tensor, block_slots: int) -> torch.Tensor:
    """All slots of these blocks, in their order."""
    if block_slots == 1:
        return blocks
    slots = torch.arange(block_slots, device=blocks.device)
    return (blocks[:, None] * block_slots + slots).flatten()

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

    @property
    def highest(self) -> int:
        return int(self.target.max()) if len(self.target) else 0

    @property
    def moved(self) -> int:
        return int((self.source != self.target).sum())


def compact(taken: torch.Tensor, capacity: int) -> SlotChange:
    """Move slots above `capacity` to the lowest free ones; raises `InternalError` if too many."""
    high = taken > capacity
    low = taken[~high]
    used = torch.zeros(capacity + 1, dtype=torch.bool)
    used[low] = True
    used[0] = True
    room = torch.nonzero(~used).flatten()[: int(high.sum())]
    if len(room) < int(high.sum()):
        raise InternalError(f"{len(taken)} slots cannot be compacted into {capacity}")
    target = taken.clone()
    target[high] = room
    return SlotChange(taken, target)

"""SGLang's slot allocator with a capacity that moves."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

from kunserve_sglang.core.errors import InternalError


class ElasticSlotAllocator(TokenToKVPoolAllocator):
    """Hands out slots `1..size`; `size` follows the layout.

    While low slots are preferred, a freed one is used again before any higher one, so that little
    has to be compacted when the layers come back. It costs a sort after each free, so independent
    instances go without.
    """

    free_pages: torch.Tensor
    release_pages: torch.Tensor
    free_group: list[torch.Tensor]

    def prefer_low_slots(self, prefer: bool) -> None:
        self.need_sort = prefer
        if not prefer:
            self.free_pages = torch.cat((self.free_pages, self.release_pages))
            self.release_pages = self.release_pages[:0]

    def alloc(self, need_size: int) -> torch.Tensor | None:
        if self.need_sort:
            self.merge_and_sort_free()
        slots: torch.Tensor | None = super().alloc(need_size)
        return slots

    def taken(self) -> torch.Tensor:
        """Slots that are not free, ascending, int64."""
        mask = torch.ones(self.size + 1, dtype=torch.bool, device=self.device)
        mask[0] = False
        mask[self.free_pages] = False
        mask[self.release_pages] = False
        return torch.nonzero(mask).flatten()

    def rebuild(self, size: int, taken: torch.Tensor) -> None:
        """Adopt a new capacity and set of taken slots. Raises `InternalError` if one is above."""
        if len(taken) and int(taken.max()) > size:
            raise InternalError(f"slot {int(taken.max())} is taken, the capacity is {size}")
        self.size = size
        mask = torch.ones(size + 1, dtype=torch.bool, device=self.device)
        mask[0] = False
        mask[taken] = False
        self.free_pages = torch.nonzero(mask).flatten()
        self.release_pages = self.release_pages[:0]
        # A failure in the middle of a result leaves slots behind that were to be freed together.
        self.is_not_in_free_group = True
        self.free_group.clear()

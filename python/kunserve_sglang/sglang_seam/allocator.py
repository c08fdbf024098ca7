"""SGLang's slot allocators with a capacity that moves.

SGLang has one that hands out single slots and one, for `--page-size` above 1, that hands out blocks
of them: both keep lists of free blocks, which are slots where a block is one.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator import (
    BaseTokenToKVPoolAllocator,
    PagedTokenToKVPoolAllocator,
    TokenToKVPoolAllocator,
)

from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.instance.transitions.compaction import slots_of


class ElasticAllocator(BaseTokenToKVPoolAllocator):
    """Hands out the blocks of the first `size` slots; `size` follows the layout.

    While low slots are preferred, a freed one is used again before any higher one, so that little
    has to be compacted when the layers come back. It costs a sort after each free, so independent
    instances go without.
    """

    size: int
    page_size: int
    free_pages: torch.Tensor
    release_pages: torch.Tensor
    free_group: list[torch.Tensor]

    def prefer_low_slots(self, prefer: bool) -> None:
        self.need_sort = prefer
        if not prefer:
            self.free_pages = torch.cat((self.free_pages, self.release_pages))
            self.release_pages = self.release_pages[:0]

    def taken(self) -> torch.Tensor:
        """Slots of blocks that are not free, ascending, int64."""
        mask = torch.ones(self.size // self.page_size + 1, dtype=torch.bool, device=self.device)
        mask[0] = False
        mask[self.free_pages] = False
        mask[self.release_pages] = False
        return slots_of(torch.nonzero(mask).flatten(), self.page_size)

    def rebuild(self, size: int, taken: torch.Tensor) -> None:
        """Adopt a new capacity and set of taken slots.

        Raises `InternalError` if one is above, or if the capacity has a part of a block.
        """
        blocks, rest = divmod(size, self.page_size)
        if rest:
            raise InternalError(f"{size} slots are not whole blocks of {self.page_size}")
        if len(taken) and int(taken.max()) // self.page_size > blocks:
            raise InternalError(f"slot {int(taken.max())} is taken, the capacity is {size}")
        self.size = size
        mask = torch.ones(blocks + 1, dtype=torch.bool, device=self.device)
        mask[0] = False
        mask[taken // self.page_size] = False
        self.free_pages = torch.nonzero(mask).flatten()
        self.release_pages = self.release_pages[:0]
        # A failure in the middle of a result leaves slots behind that were to be freed together.
        self.is_not_in_free_group = True
        self.free_group.clear()


class ElasticSlotAllocator(ElasticAllocator, TokenToKVPoolAllocator):
    """One slot is a block."""

    def alloc(self, need_size: int) -> torch.Tensor | None:
        if self.need_sort:
            self.merge_and_sort_free()
        slots: torch.Tensor | None = super().alloc(need_size)
        return slots


class ElasticBlockAllocator(ElasticAllocator, PagedTokenToKVPoolAllocator):
    """Blocks of several slots; on a CPU without SGLang's kernels, which need Triton."""

    def rebuild(self, size: int, taken: torch.Tensor) -> None:
        super().rebuild(size, taken)
        self.num_pages = size // self.page_size

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        if self.need_sort:
            self.merge_and_sort_free()
        if self.device == "cpu":
            return self._extend(prefix_lens, seq_lens, last_loc)
        slots: torch.Tensor | None = super().alloc_extend(
            prefix_lens,
            prefix_lens_cpu,
            seq_lens,
            seq_lens_cpu,
            last_loc,
            extend_num_tokens,
            num_new_pages,
        )
        return slots

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        if self.need_sort:
            self.merge_and_sort_free()
        if self.device == "cpu":
            return self._extend(seq_lens - 1, seq_lens, last_loc)
        slots: torch.Tensor | None = super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        return slots

    def _extend(
        self, prefix_lens: torch.Tensor, seq_lens: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        new = new_blocks(prefix_lens, seq_lens, self.page_size)
        count = int(new.sum())
        if count > len(self.free_pages):
            return None
        blocks, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        return extended(prefix_lens, seq_lens, last_loc, blocks, self.page_size)


def allocator_for(page_size: int, size: int, **arguments: Any) -> ElasticAllocator:
    """One of `size` slots, in blocks of `page_size`; the rest is SGLang's."""
    if page_size == 1:
        return ElasticSlotAllocator(size, **arguments)
    return ElasticBlockAllocator(size, page_size, **arguments)


def new_blocks(prefix_lens: torch.Tensor, seq_lens: torch.Tensor, page_size: int) -> torch.Tensor:
    """Blocks that each request needs beside those of its prefix."""
    return _blocks(seq_lens, page_size) - _blocks(prefix_lens, page_size)


def extended(
    prefix_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    blocks: torch.Tensor,
    page_size: int,
) -> torch.Tensor:
    """The slots of the tokens behind the prefixes, one request after the other.

    A request fills up its last block, behind `last_loc`, and goes on in the next ones of `blocks`.
    """
    lengths = seq_lens - prefix_lens
    request = torch.repeat_interleave(lengths)
    position = torch.arange(len(request)) - (lengths.cumsum(0) - lengths - prefix_lens)[request]
    begun = _blocks(prefix_lens, page_size)[request]
    new = new_blocks(prefix_lens, seq_lens, page_size)
    slots = last_loc.long()[request] + 1 + position - prefix_lens[request]
    beyond = position // page_size >= begun
    place = (new.cumsum(0) - new)[request] + position // page_size - begun
    slots[beyond] = blocks[place[beyond]] * page_size + position[beyond] % page_size
    return slots


def _blocks(lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    return (lengths + page_size - 1) // page_size

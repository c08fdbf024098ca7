"""The KV cache of one instance: per layer one K and one V buffer for all owners it serves.

A buffer is reserved once for `owners * stride` slots and cut into one sub-range an owner, the
instance's own at offset 0. A stage finds slot `i` of owner `j` at `base(j) + i`, so slot ids are
the owner's everywhere and never change.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

from kunserve_sglang.core.errors import InternalError, TransientError
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.memory import PhysicalPagePool, VirtualBuffer


@dataclass(frozen=True, slots=True)
class KvShape:
    """Shape of the cache: heads and head sizes of one token in one layer."""

    layers: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def key_row_bytes(self) -> int:
        return self.heads * self.key_dim * self.dtype.itemsize

    @property
    def value_row_bytes(self) -> int:
        return self.heads * self.value_dim * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.layers * (self.key_row_bytes + self.value_row_bytes)


def aligned_stride(slots: int, shape: KvShape, page_bytes: int, block_slots: int = 1) -> int:
    """The least number of whole blocks of rows for `slots` slots, and the dummy block.

    Its K and V both end on a page boundary.
    """
    unit = block_slots
    for row in (shape.key_row_bytes, shape.value_row_bytes):
        step = page_bytes // gcd(page_bytes, row)
        unit = unit * step // gcd(unit, step)
    return -(-(slots + block_slots) // unit) * unit


class KvStore:
    """Elastic K and V buffers of all layers.

    The first `block_slots` rows of every sub-range are SGLang's dummy, so `n` slots are the next
    `n` rows, a whole number of blocks.
    """

    def __init__(
        self,
        pool: PhysicalPagePool,
        shape: KvShape,
        *,
        instance: int,
        stride: int,
        owners: int,
        block_slots: int = 1,
    ) -> None:
        self.shape = shape
        self.stride = stride
        self._block_slots = block_slots
        self.rows = stride * owners
        """Of each buffer, mapped or not."""
        self._owners: list[int | None] = [instance] + [None] * (owners - 1)
        rows = self.rows
        self._buffers = [
            (
                VirtualBuffer(pool, rows * shape.key_row_bytes),
                VirtualBuffer(pool, rows * shape.value_row_bytes),
            )
            for _ in range(shape.layers)
        ]
        self._tensors = [
            (
                k.tensor(shape.dtype, (rows, shape.heads, shape.key_dim)),
                v.tensor(shape.dtype, (rows, shape.heads, shape.value_dim)),
            )
            for k, v in self._buffers
        ]
        self._slots: dict[tuple[int, int], int] = {}

    @property
    def device(self) -> torch.device:
        return self._tensors[0][0].device

    @property
    def pages(self) -> int:
        """Pages that KV takes now."""
        return sum(k.mapped_pages + v.mapped_pages for k, v in self._buffers)

    def base(self, owner: int) -> int:
        """First row of the owner's sub-range; the same in every layer of this stage."""
        try:
            return self._owners.index(owner) * self.stride
        except ValueError:
            raise InternalError(f"instance {owner} owns no sub-range here") from None

    def admit(self, owner: int) -> None:
        """Give `owner` a sub-range; nothing is mapped yet. Raises `TransientError` if full."""
        if owner in self._owners:
            return
        if None not in self._owners:
            raise TransientError(f"no sub-range left for instance {owner}")
        self._owners[self._owners.index(None)] = owner

    def dismiss(self, owner: int) -> None:
        """Take the sub-range of `owner` back; all its layers must have been released."""
        if any(key[1] == owner for key in self._slots):
            raise InternalError(f"instance {owner} still has KV mapped here")
        self._owners[self._owners.index(owner)] = None

    def clear(self) -> None:
        """Unmap everything; only the instance itself owns a sub-range then."""
        for layer, owner in list(self._slots):
            self.release(layer, owner)
        self._owners[1:] = [None] * (len(self._owners) - 1)

    def owners(self) -> list[int]:
        return [owner for owner in self._owners if owner is not None]

    def slots(self, layer: int, owner: int) -> int:
        """Slots mapped for `owner` in `layer`; 0 if the layer is not held for it."""
        return self._slots.get((layer, owner), 0)

    def resize(self, layer: int, owner: int, slots: int) -> None:
        """Make exactly `slots` slots (and the dummy block) usable.

        Raises `OutOfPages` or `MappingRefused`; as many as before are usable then, or `slots` if
        these are fewer. It can be asked for again.
        """
        if slots + self._block_slots > self.stride:
            raise InternalError(f"{slots} slots exceed the reserved stride of {self.stride}")
        base = self.base(owner)
        try:
            for buffer, row in zip(self._buffers[layer], self._row_bytes, strict=True):
                buffer.map(base * row, (base + slots + self._block_slots) * row)
        except TransientError:
            self._unmap_above(layer, owner)
            raise
        self._slots[layer, owner] = min(slots, self._slots.get((layer, owner), slots))
        self._unmap_above(layer, owner, slots)
        self._slots[layer, owner] = slots

    def _unmap_above(self, layer: int, owner: int, slots: int | None = None) -> None:
        """Give back what lies above `slots`; by default, above what is usable."""
        if slots is None:
            slots = self._slots.get((layer, owner), -self._block_slots)
        base = self.base(owner)
        first = base + slots + self._block_slots
        for buffer, row in zip(self._buffers[layer], self._row_bytes, strict=True):
            buffer.unmap(first * row, (base + self.stride) * row)

    def release(self, layer: int, owner: int) -> None:
        """Unmap everything `owner` has in `layer`.

        Raises `MappingRefused`; it can be asked for again then.
        """
        self._unmap_above(layer, owner, -self._block_slots)
        self._slots.pop((layer, owner), None)

    def buffers(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """K and V of `layer`, shape `(owners * stride, heads, dim)`; None if nothing is mapped."""
        if any(key[0] == layer for key in self._slots):
            return self._tensors[layer]
        return None

    def gather(
        self, layers: LayerRange, owner: int, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the K and V rows of `slots`, each `(len(layers), len(slots), heads, dim)`."""
        rows = self._rows(owner, slots)
        keys, values = zip(*(self._tensors[layer] for layer in layers), strict=True)
        return (
            torch.stack([k.index_select(0, rows) for k in keys]),
            torch.stack([v.index_select(0, rows) for v in values]),
        )

    def scatter(
        self, layers: LayerRange, owner: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Write rows gathered elsewhere, perhaps on another device, to `slots` of `owner`."""
        rows = self._rows(owner, slots)
        k, v = (rows_of.to(rows.device, non_blocking=True) for rows_of in (k, v))
        for index, layer in enumerate(layers):
            keys, values = self._tensors[layer]
            keys.index_copy_(0, rows, k[index])
            values.index_copy_(0, rows, v[index])

    def move(self, layer: int, owner: int, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the rows of slots `source` to slots `target`."""
        read, written = self._rows(owner, source), self._rows(owner, target)
        for tensor in self._tensors[layer]:
            tensor[written] = tensor[read]

    def _rows(self, owner: int, slots: torch.Tensor) -> torch.Tensor:
        """Rows of the buffers, on their device, for slots that are counted anywhere."""
        return slots.to(self.device, torch.int64, non_blocking=True) + self.base(owner)

    @property
    def _row_bytes(self) -> tuple[int, int]:
        return self.shape.key_row_bytes, self.shape.value_row_bytes

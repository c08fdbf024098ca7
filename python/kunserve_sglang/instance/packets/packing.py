"""Integers of a packet, and what stages must know of a micro-batch as one row of them.

They are known on the host and needed on the host. In the memory of a GPU, where activations and KV
pass, each tensor of them would cost two copies that wait for the device. So few travel in the
packet's header, and many as one tensor.
"""

from __future__ import annotations

import msgspec
import torch

from kunserve_sglang.instance.packets.request_table import TableDelta
from kunserve_sglang.instance.parts.engine import StageBatch

INLINE_BYTES = 16 << 10
"""Room for a decode step of 290 requests. Messages between processes take eight times as much."""


class Packed(msgspec.Struct, frozen=True, array_like=True):
    """How to read the integers; and they themselves, int64, unless they are a tensor."""

    requests: int
    tokens: int
    slots: int
    decode: bool
    inline: bytes


def inlined(integers: torch.Tensor) -> tuple[bytes, list[torch.Tensor]]:
    """Flat int64 on the host, as bytes for a header; if they are too many, as a list of one."""
    if integers.nbytes > INLINE_BYTES:
        return b"", [integers]
    return integers.numpy().tobytes(), []


def integers_of(inline: bytes, beside: list[torch.Tensor]) -> torch.Tensor:
    """The inverse of `inlined`."""
    if beside:
        return beside[0]
    if not inline:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(bytearray(inline), dtype=torch.int64)


def pack(batch: StageBatch, delta: TableDelta) -> tuple[Packed, list[torch.Tensor]]:
    """Both as integers; the list is what has to travel as a tensor: flat int64, or nothing.

    All tensors are on the host. `batch` and `delta` are about the same rows.
    """
    parts = [batch.rows, batch.seq_lens, delta.starts, delta.lengths]
    if batch.prefix_lens is not None and batch.extend_lens is not None:
        parts += [batch.prefix_lens, batch.extend_lens]
    integers = torch.cat([*parts, batch.positions, batch.out_slots, delta.slots])
    inline, beside = inlined(integers)
    packed = Packed(
        requests=len(batch.rows),
        tokens=len(batch.positions),
        slots=len(delta.slots),
        decode=batch.decode,
        inline=inline,
    )
    return packed, beside


def unpack(
    owner: int, packed: Packed, tensors: list[torch.Tensor]
) -> tuple[StageBatch, TableDelta]:
    """The inverse of `pack`; lengths of chunks are int32 and all else int64.

    The tensors are views, of what `tensors` holds if there is any.
    """
    integers = integers_of(packed.inline, tensors)
    tables = 4 if packed.decode else 6
    sizes = [packed.requests] * tables + [packed.tokens, packed.tokens, packed.slots]
    parts = torch.split(integers, sizes)
    rows, seq_lens, starts, lengths, *chunks, positions, out_slots, slots = parts
    batch = StageBatch(
        owner=owner,
        rows=rows,
        seq_lens=seq_lens,
        positions=positions,
        out_slots=out_slots,
        prefix_lens=None if packed.decode else chunks[0].int(),
        extend_lens=None if packed.decode else chunks[1].int(),
    )
    return batch, TableDelta(rows, starts, lengths, slots)

"""What the stages must know of a micro-batch, as one row of integers.

All of it is known on the host and needed on the host. In the memory of a GPU, where activations
pass, each tensor of it would cost a copy that waits for the device. So few integers travel in the
packet's header, and many as one tensor.
"""

from __future__ import annotations

import msgspec
import torch

from kunserve_sglang.instance.engine import StageBatch
from kunserve_sglang.instance.request_table import TableDelta

INLINE_BYTES = 16 << 10
"""Room for a decode step of 290 requests. Messages between processes take eight times as much."""


class Packed(msgspec.Struct, frozen=True, array_like=True):
    """How to read the integers; and they themselves, int64, unless they are a tensor."""

    requests: int
    tokens: int
    slots: int
    decode: bool
    inline: bytes


def pack(batch: StageBatch, delta: TableDelta) -> tuple[Packed, list[torch.Tensor]]:
    """Both as integers; the list is what has to travel as a tensor: flat int64, or nothing.

    All tensors are on the host. `batch` and `delta` are about the same rows.
    """
    parts = [batch.rows, batch.seq_lens, delta.starts, delta.lengths]
    if batch.prefix_lens is not None and batch.extend_lens is not None:
        parts += [batch.prefix_lens, batch.extend_lens]
    integers = torch.cat([*parts, batch.positions, batch.out_slots, delta.slots])
    fits = integers.nbytes <= INLINE_BYTES
    packed = Packed(
        requests=len(batch.rows),
        tokens=len(batch.positions),
        slots=len(delta.slots),
        decode=batch.decode,
        inline=integers.numpy().tobytes() if fits else b"",
    )
    return packed, [] if fits else [integers]


def unpack(
    owner: int, packed: Packed, tensors: list[torch.Tensor]
) -> tuple[StageBatch, TableDelta]:
    """The inverse of `pack`; lengths of chunks are int32 and all else int64.

    The tensors are views, of what `tensors` holds if there is any.
    """
    if packed.inline:
        integers = torch.frombuffer(bytearray(packed.inline), dtype=torch.int64)
    else:
        integers = tensors[0]
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

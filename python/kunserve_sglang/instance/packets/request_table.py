"""Request tables of other owners, kept up to date by differences.

A stage needs to know which slots a request's tokens are in. Sending the whole list with every
micro-batch would cost as much as the context is long; instead the owner remembers what it sent
(`sent_rows`) and sends each row from the first position that differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_MAX_BYTES = 64 << 20
"""Of a device's memory for the rows of one owner: 512 requests of 32,768 tokens."""


@dataclass(frozen=True, slots=True)
class TableDelta:
    """New content of some rows: row `rows[i]` gets `lengths[i]` slots from `starts[i]` on."""

    rows: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor


class MirroredRows:
    """Stage side: another owner's rows in this stage's addresses.

    On `device`, where attention reads them, so that a decode step brings one slot a request there
    instead of whole rows; on the host if they would take much of the device's memory.
    """

    def __init__(self, rows: int, context: int, base: int, device: torch.device) -> None:
        if device.type != "cpu" and rows * context * torch.int32.itemsize <= _MAX_BYTES:
            self.table = torch.zeros((rows, context), dtype=torch.int32, device=device)
        else:
            # The kernel gives it pages when they are written, and most never are.
            self.table = torch.from_numpy(np.zeros((rows, context), dtype=np.int32))
        self.base = base

    def apply(self, delta: TableDelta) -> None:
        """All of `delta` is on the host; it gets there in one copy."""
        places = places_of(self.table, delta.rows, delta.starts, delta.lengths)
        there = torch.stack([places, delta.slots + self.base])
        places, slots = there.to(self.table.device, non_blocking=True)
        self.table.view(-1).index_copy_(0, places, slots.int())

    def slots(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        """As `SentRows.slots`: in the owner's numbers."""
        there = rows_on_host(self.table, rows, int(seq_lens.max()))
        return spans_of(*there, seq_lens) - self.base


def places_of(
    table: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Where in the flat `table` row `rows[i]` has its `lengths[i]` entries from `starts[i]` on.

    One row after the other, int64 on the host, as all but the table are.
    """
    begins = rows * table.shape[1] + starts - lengths.cumsum(0) + lengths
    return torch.arange(int(lengths.sum())) + begins.repeat_interleave(lengths)


def rows_on_host(
    table: torch.Tensor, rows: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A table on the host with the first `width` slots of these rows, and where in it they are.

    The live one, or one copy of them all out of the memory of a GPU.
    """
    if table.device.type == "cpu":
        return table, rows
    there = table[rows.to(table.device, non_blocking=True), :width]
    return there.cpu(), torch.arange(len(rows))


def spans_of(table: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The first `lengths[i]` entries of row `rows[i]` of a table on the host, int64."""
    spans = zip(rows.tolist(), lengths.tolist(), strict=True)
    return torch.cat([table[row, :length] for row, length in spans]).long()

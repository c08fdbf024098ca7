"""Request tables of other owners, kept up to date by differences.

A stage needs to know which slots a request's tokens are in. Sending the whole list with every
micro-batch would cost as much as the context is long; instead the owner remembers what it sent
(`sent_rows`) and sends each row from the first position that differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class TableDelta:
    """New content of some rows: row `rows[i]` gets `lengths[i]` slots from `starts[i]` on."""

    rows: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor


class MirroredRows:
    """Stage side: another owner's rows in this stage's addresses."""

    def __init__(self, rows: int, context: int, base: int) -> None:
        self.table = torch.from_numpy(np.zeros((rows, context), dtype=np.int32))
        self.base = base

    def apply(self, delta: TableDelta) -> None:
        slots = delta.slots.to(torch.int32) + self.base
        position = 0
        for row, start, length in zip(
            delta.rows.tolist(), delta.starts.tolist(), delta.lengths.tolist(), strict=True
        ):
            self.table[row, start : start + length] = slots[position : position + length]
            position += length

    def slots(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        """As `SentRows.slots`: in the owner's numbers."""
        return spans_of(self.table, rows, seq_lens) - self.base


def spans_of(table: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The first `lengths[i]` entries of row `rows[i]` of a table on the host, int64."""
    spans = zip(rows.tolist(), lengths.tolist(), strict=True)
    return torch.cat([table[row, :length] for row, length in spans]).long()

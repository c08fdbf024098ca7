"""Request tables of other owners, kept up to date by differences.

A stage needs to know which slots a request's tokens are in. Sending the whole list with every
micro-batch would cost as much as the context is long; instead the owner remembers what it sent
and sends each row from the first position that differs. Comparing (instead of assuming that rows
only grow) also catches SGLang's rewriting of a prefix when a request finds its tokens cached.
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


class SentRows:
    """Owner side: what the group was told about each row."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table
        # Large, and made while everybody waits: what is not used is not touched either.
        self._sent = torch.empty_like(table, device="cpu")
        self._length = [0] * table.shape[0]

    def slots(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        """All that the requests in these rows hold, int64."""
        return _spans(*self._on_host(rows, seq_lens), seq_lens)

    def difference(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> TableDelta:
        """What the group does not know yet of the first `seq_lens[i]` slots of `rows[i]`."""
        starts, lengths, pieces = [], [], []
        table, places = self._on_host(rows, seq_lens)
        spans = zip(rows.tolist(), places.tolist(), seq_lens.tolist(), strict=True)
        for row, place, length in spans:
            start = self._first_difference(table[place], row, length)
            pieces.append(table[place, start:length])
            self._sent[row, start:length] = pieces[-1]
            self._length[row] = length
            starts.append(start)
            lengths.append(length - start)
        return TableDelta(rows, torch.tensor(starts), torch.tensor(lengths), torch.cat(pieces))

    def _on_host(
        self, rows: torch.Tensor, seq_lens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A table with the first `seq_lens[i]` slots of `rows[i]`, and which of its rows they are.

        The live one, or copies of these rows out of the memory of a GPU, all at once.
        """
        if self._table.device.type == "cpu":
            return self._table, rows
        live = self._table[rows.to(self._table.device), : int(seq_lens.max())]
        return live.cpu(), torch.arange(len(rows))

    def _first_difference(self, now: torch.Tensor, row: int, length: int) -> int:
        known = min(self._length[row], length)
        changed = torch.nonzero(now[:known] != self._sent[row, :known])
        return int(changed[0]) if len(changed) else known


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
        return _spans(self.table, rows, seq_lens) - self.base


def _spans(table: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    spans = zip(rows.tolist(), lengths.tolist(), strict=True)
    return torch.cat([table[row, :length] for row, length in spans]).long()

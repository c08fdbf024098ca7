"""What an owner has told its group of its request table.

Comparing what is there with what was sent (instead of assuming that rows only grow) also catches
SGLang's rewriting of a prefix when a request finds its tokens cached.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from kunserve_sglang.instance.packets.request_table import (
    TableDelta,
    places_of,
    rows_on_host,
    spans_of,
)
from kunserve_sglang.instance.parts.engine import StageBatch

_BLOCK = 8192
"""Columns of a device's table that are compared together: bounds the memory that this takes."""

_SEED = 20_260
"""All ranks of an instance come to the same answers."""


class SentRows(Protocol):
    """What the group knows of each row of one owner's table."""

    def slots(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        """All that the requests in these rows hold, int64."""
        ...

    def difference(self, batch: StageBatch) -> tuple[StageBatch, TableDelta]:
        """What the group does not know yet of the requests of an own micro-batch.

        Returns the micro-batch as well, all of it on the host.
        """
        ...


def sent_rows(table: torch.Tensor) -> SentRows:
    """For the live table, `(rows, context)`, wherever it is."""
    return HostSentRows(table) if table.device.type == "cpu" else DeviceSentRows(table)


class HostSentRows:
    """Of a table on the host, compared with a copy of what was sent."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table
        # Large, and made while everybody waits: what is not used is not touched either.
        self._sent = torch.empty_like(table)
        self._length = [0] * table.shape[0]

    def slots(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        return spans_of(self._table, rows, seq_lens)

    def difference(self, batch: StageBatch) -> tuple[StageBatch, TableDelta]:
        starts, lengths, pieces = [], [], []
        table = self._table
        for row, length in zip(batch.rows.tolist(), batch.seq_lens.tolist(), strict=True):
            start = self._first_difference(table[row], row, length)
            pieces.append(table[row, start:length])
            self._sent[row, start:length] = pieces[-1]
            self._length[row] = length
            starts.append(start)
            lengths.append(length - start)
        delta = TableDelta(
            batch.rows, torch.tensor(starts), torch.tensor(lengths), torch.cat(pieces)
        )
        return batch, delta

    def _first_difference(self, now: torch.Tensor, row: int, length: int) -> int:
        known = min(self._length[row], length)
        changed = torch.nonzero(now[:known] != self._sent[row, :known])
        return int(changed[0]) if len(changed) else known


class DeviceSentRows:
    """Of a table in the memory of a GPU, compared there, by fingerprints of what was sent.

    Each copy to the host waits for the device, and whole rows of long contexts would take longer
    than a decode step. So one small copy brings the answer together with the slots of the new
    tokens; only rows that are new to the group, or were rewritten, take a second one.

    A row's fingerprint is the sum of its slots, each times a random 64-bit weight of its position,
    modulo 2**64. Rows that differ have the same one with a probability of 2**-34 at most, in a
    pool of a million slots of 2**-44.
    """

    def __init__(self, table: torch.Tensor) -> None:
        rows, context = table.shape
        device = table.device
        random = torch.Generator().manual_seed(_SEED)
        weights = torch.randint(-(2**63), 2**63 - 1, (context,), generator=random)
        self._table = table
        self._weights = weights.to(device)
        self._places = torch.arange(context, device=device)
        self._sent = torch.zeros(rows, dtype=torch.int64, device=device)
        self._length = torch.zeros(rows, dtype=torch.int64)

    def slots(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        return spans_of(*rows_on_host(self._table, rows, int(seq_lens.max())), seq_lens)

    def difference(self, batch: StageBatch) -> tuple[StageBatch, TableDelta]:
        rows, lengths = batch.rows, batch.seq_lens
        written = lengths - 1 if batch.prefix_lens is None else batch.prefix_lens.long()
        # What was sent of a longer request, whose row this once was, says nothing of this one.
        told = self._length[rows]
        known = torch.where(told <= written, told, 0)
        same, out_slots = self._compared(rows, known, lengths, batch.out_slots)
        starts = torch.where(same, known, 0)
        if torch.equal(starts, written):
            slots = out_slots
        else:
            slots = self._slots_between(rows, starts, lengths)
        self._length[rows] = lengths
        delta = TableDelta(rows, starts, lengths - starts, slots)
        return dataclasses.replace(batch, out_slots=out_slots), delta

    def _compared(
        self,
        rows: torch.Tensor,
        known: torch.Tensor,
        lengths: torch.Tensor,
        out_slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each row begins with the `known` slots that were sent; and `out_slots`.

        Both on the host, in one copy. The first `lengths` slots are what has been sent from now on.
        """
        there = torch.stack([rows, known, lengths]).to(self._table.device, non_blocking=True)
        before, after = self._fingerprints(*there, longest=int(lengths.max()))
        same = before == self._sent[there[0]]
        self._sent[there[0]] = after
        answer = torch.cat([same.long(), out_slots.long()]).cpu()
        return answer[: len(rows)].bool(), answer[len(rows) :]

    def _fingerprints(
        self, rows: torch.Tensor, known: torch.Tensor, lengths: torch.Tensor, *, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the first `known` slots of each row, and of the first `lengths`."""
        before, after = torch.zeros_like(known), torch.zeros_like(known)
        for begin in range(0, longest, _BLOCK):
            part = slice(begin, min(begin + _BLOCK, longest))
            terms = self._table[:, part].index_select(0, rows) * self._weights[part]
            places = self._places[part]
            before += (terms * (places < known[:, None])).sum(1)
            after += (terms * (places < lengths[:, None])).sum(1)
        return before, after

    def _slots_between(
        self, rows: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Those of all rows in turn, on the host."""
        places = places_of(self._table, rows, starts, lengths - starts)
        there = places.to(self._table.device, non_blocking=True)
        return self._table.view(-1).index_select(0, there).cpu()

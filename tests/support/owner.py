"""An owner's request table as it changes, and a stage that follows what it is told."""

from __future__ import annotations

import random

import torch

from kunserve_sglang.instance.packets.request_table import MirroredRows
from kunserve_sglang.instance.parts.engine import StageBatch
from kunserve_sglang.instance.pipeline.sent_rows import SentRows

ROWS, CONTEXT, BASE = 6, 40, 1000


class Owner:
    """A table whose requests grow, leave their rows to others, and have prefixes rewritten."""

    def __init__(self, seed: int, context: int = CONTEXT, device: str = "cpu") -> None:
        self.random = random.Random(seed)
        self.table = torch.zeros((ROWS, context), dtype=torch.int32, device=device)
        self.lengths = [0] * ROWS
        self._next = 1

    def step(self) -> StageBatch:
        """Any rows, each one token longer, or all of them by some tokens."""
        self._disturb()
        rows = self.random.sample(range(ROWS), self.random.randrange(1, ROWS + 1))
        decode = all(0 < self.lengths[row] < self.table.shape[1] for row in rows)
        decode = decode and self.random.random() < 0.7
        return self.grow(rows, [1 if decode else self.random.randrange(1, 6) for _ in rows], decode)

    def grow(self, rows: list[int], tokens: list[int], decode: bool) -> StageBatch:
        prefixes, slots, positions = [], [], []
        for row, count in zip(rows, tokens, strict=True):
            if self.lengths[row] + count > self.table.shape[1]:
                self.lengths[row] = 0  # somebody else
            first, end = self.lengths[row], self.lengths[row] + count
            slots.append(self._new_slots(count))
            self.table[row, first:end] = slots[-1]
            self.lengths[row] = end
            prefixes.append(first)
            positions.append(torch.arange(first, end))
        return StageBatch(
            owner=0,
            rows=torch.tensor(rows),
            seq_lens=torch.tensor([self.lengths[row] for row in rows]),
            positions=torch.cat(positions),
            out_slots=torch.cat(slots).to(self.table.device),
            prefix_lens=None if decode else torch.tensor(prefixes, dtype=torch.int32),
            extend_lens=None if decode else torch.tensor(tokens, dtype=torch.int32),
        )

    def _disturb(self) -> None:
        row = self.random.randrange(ROWS)
        length = self.lengths[row]
        if self.random.random() < 0.2:
            self.lengths[row] = self.random.randrange(length + 1)  # another, with cached tokens
        elif length and self.random.random() < 0.3:
            place = self.random.randrange(length)
            self.table[row, place] = int(self._new_slots(1))

    def _new_slots(self, count: int) -> torch.Tensor:
        self._next += count
        return torch.arange(self._next - count, self._next)


def follow(owner: Owner, sent: SentRows, mirror: MirroredRows, batch: StageBatch) -> None:
    """A stage that has been told of the micro-batch sees the requests as their owner does."""
    told, delta = sent.difference(batch)
    mirror.apply(delta)
    assert torch.equal(told.out_slots, batch.out_slots.cpu())
    for row, length in zip(batch.rows.tolist(), batch.seq_lens.tolist(), strict=True):
        mirrored = mirror.table[row, :length].cpu() - BASE
        assert torch.equal(mirrored, owner.table[row, :length].cpu())
    reads = sent.slots(batch.rows, batch.seq_lens)
    assert torch.equal(reads, mirror.slots(batch.rows, batch.seq_lens))

"""A runtime of whole numbers: its results show which layers a micro-batch has been through, and its
KV for which token it was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.core.load import Load, Slots
from kunserve_sglang.core.messages import Attainable
from kunserve_sglang.execution.formation import PeerWork
from kunserve_sglang.instance.packets.request_table import spans_of
from kunserve_sglang.instance.parts.cache_log import CacheLog
from kunserve_sglang.instance.parts.engine import Hidden, StageBatch
from kunserve_sglang.instance.store.kv_store import KvStore
from kunserve_sglang.instance.store.parameters import ParameterStore

if TYPE_CHECKING:
    from kunserve_sglang.instance.agent.agent import Agent

ROWS, CONTEXT = 3, 6
_WORK = PeerWork(batch_ms=1.0, round_ms=1.0)


class ModelEngine:
    """An `instance.parts.engine.Engine` of up to `ROWS` requests of up to `CONTEXT` tokens.

    Hidden states are one number a token, to which every layer adds its own power of two: so what
    comes back tells whether each layer has run exactly once.
    """

    def __init__(
        self,
        layer_count: int,
        parameters: ParameterStore,
        kv: KvStore,
        refill: Callable[[int], None],
        clock: Callable[[], float],
        capacity: int,
    ) -> None:
        self.layer_count = layer_count
        self.clock = clock
        self.demand = 0
        self.ended = False
        self.steps = self.errors = 0
        self.agent: Agent | None = None
        self.cooperating = False
        self._parameters = parameters
        self._kv = kv
        self._refill = refill
        self._capacity = capacity
        self._slots: dict[int, list[int]] = {}
        self._flying: set[int] = set()
        self._table = torch.zeros((ROWS, CONTEXT), dtype=torch.int32)

    # -- what the model does with it -------------------------------------------------------------

    def step(self, rows: Sequence[int]) -> None:
        """One more token for each of these rows that is not in flight, wherever its layers are."""
        rows = [row for row in rows if row not in self._flying and self._grow(row)]
        if not rows:
            return
        batch = self._batch(rows)
        hidden = torch.zeros(len(rows), 1), None
        if not self.cooperating:
            every = LayerRange(0, self.layer_count)
            self._check(self._run_own(every, batch, hidden))
            return
        assert self.agent is not None
        self._flying |= set(rows)
        self.agent.pipeline.submit(
            batch, hidden, lambda layers, h: self._run_own(layers, batch, h), _WORK
        )

    def collect(self) -> bool:
        assert self.agent is not None
        came = self.agent.pipeline.collect()
        if came is None:
            return False
        self._check(came[1])
        if not self.agent.pipeline.in_flight:
            self._flying.clear()
        return True

    def finish(self) -> None:
        """All requests that are not in flight end."""
        self._slots = {row: s for row, s in self._slots.items() if row in self._flying}

    def _run_own(self, layers: LayerRange, batch: StageBatch, hidden: Hidden) -> Hidden:
        return self._run(layers, batch, spans_of(self._table, batch.rows, batch.seq_lens), hidden)

    def _run(
        self, layers: LayerRange, batch: StageBatch, reads: torch.Tensor, hidden: Hidden
    ) -> Hidden:
        """`reads` are the slots of all tokens of its requests, one request after the other."""
        for layer in layers:
            assert layer in self._parameters.held(), f"layer {layer} is run, and not here"
            room = self._kv.slots(layer, batch.owner)
            assert int(batch.out_slots.max()) <= room, f"no room in layer {layer}"
        new = self._rows(layers, batch.rows, batch.positions)
        self._kv.scatter(layers, batch.owner, batch.out_slots, new, new)
        positions = torch.cat([torch.arange(n) for n in batch.seq_lens.tolist()])
        expected = self._rows(layers, batch.rows.repeat_interleave(batch.seq_lens), positions)
        for found in self._kv.gather(layers, batch.owner, reads):
            assert torch.equal(found, expected), "KV is not what was written for these tokens"
        return hidden[0] + sum(1 << layer for layer in layers), hidden[1]

    def _rows(
        self, layers: LayerRange, rows: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """What stands for these tokens in a layer: its K, and its V."""
        tokens = (1 + rows * CONTEXT + positions).view(1, -1, 1, 1)
        offsets = 1000 * torch.tensor(list(layers)).view(-1, 1, 1, 1)
        return (tokens + offsets).float().expand(-1, -1, 1, self._kv.shape.key_dim)

    def _check(self, hidden: Hidden) -> None:
        self.steps += 1
        assert (hidden[0] == (1 << self.layer_count) - 1).all(), "not each layer once"

    def _grow(self, row: int) -> bool:
        taken = {slot for slots in self._slots.values() for slot in slots}
        free = next((s for s in range(1, self._capacity + 1) if s not in taken), None)
        slots = self._slots.setdefault(row, [])
        if free is None or len(slots) == CONTEXT:
            self._slots.pop(row)
            return False
        slots.append(free)
        self._table[row, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
        return True

    def _batch(self, rows: Sequence[int]) -> StageBatch:
        lengths = torch.tensor([len(self._slots[row]) for row in rows])
        return StageBatch(
            owner=self.owner,
            rows=torch.tensor(rows),
            seq_lens=lengths,
            positions=lengths - 1,
            out_slots=torch.tensor([self._slots[row][-1] for row in rows]),
            prefix_lens=None,
            extend_lens=None,
        )

    owner = -1

    # -- as an engine ----------------------------------------------------------------------------

    def load(self) -> Load:
        used = sum(map(len, self._slots.values()))
        slots = Slots(used=used, cached=0, capacity=self._capacity)
        return Load(slots=slots, running=len(self._slots), waiting=0, demand=self.demand)

    def quiesce(self) -> None:
        while self._flying:
            assert self.agent is not None
            if not self.collect() and not self.agent.serve_one(0.1):
                self.agent.check_for_losses()

    def start_over(self) -> None:
        self.errors += len(self._slots)
        self._slots.clear()
        self._flying.clear()

    def reload(self, layers: Sequence[int]) -> None:
        for layer in layers:
            self._refill(layer)

    def evict_cached(self, slots: int) -> None:
        """Nothing is cached."""

    def taken_slots(self) -> torch.Tensor:
        taken = sorted(slot for slots in self._slots.values() for slot in slots)
        return torch.tensor(taken, dtype=torch.int64)

    def watch_cache(self, log: CacheLog) -> None:
        """There is no cache."""

    def largest_request(self) -> int:
        return 0

    def relocate(self, source: torch.Tensor, target: torch.Tensor) -> None:
        place = dict(zip(source.tolist(), target.tolist(), strict=True))
        for row, slots in self._slots.items():
            slots[:] = [place[slot] for slot in slots]
            self._table[row, : len(slots)] = torch.tensor(slots, dtype=torch.int32)

    def set_capacity(self, slots: int) -> None:
        self._capacity = slots
        assert all(slot <= slots for mine in self._slots.values() for slot in mine)

    def limit_requests(self, told: Attainable) -> None:
        """Requests are small."""

    def request_table(self) -> torch.Tensor:
        return self._table

    def enter_cooperation(self, owners: list[int]) -> None:  # noqa: ARG002
        self.cooperating = True

    def leave_cooperation(self) -> None:
        self.cooperating = False

    def run_stage(
        self,
        batch: StageBatch,
        table: torch.Tensor,
        base: int,
        layers: LayerRange,
        hidden: Hidden,
    ) -> Hidden:
        reads = spans_of(table, batch.rows, batch.seq_lens) - base
        return self._run(layers, batch, reads, hidden)

    def captured(self, batch: StageBatch) -> Sequence[LayerRange]:  # noqa: ARG002
        return ()

    def blank_hidden(self, tokens: int) -> Hidden:
        return torch.zeros(tokens, 1), None

    def settle(self) -> None:
        """Everything has happened."""

    def forget_owners(self) -> None:
        """Nothing is kept of them."""

    def end(self) -> None:
        self.ended = True

    def bind_kv(self) -> None:
        """Everything is looked up when it is needed."""

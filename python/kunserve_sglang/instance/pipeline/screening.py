"""What a packet must be like before anything is done with it.

Members hold one another's keys, yet one of them may run other code, or be out of order. Whatever it
sends is dropped and counted if it is no packet that this instance could have been sent; of what is
left, later checks look at what depends on the moment (`Malformed` as well).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from kunserve_sglang.core.dropped import Dropped
from kunserve_sglang.instance.packets import packing, wire
from kunserve_sglang.instance.packets.request_table import TableDelta
from kunserve_sglang.instance.parts.engine import Hidden, StageBatch
from kunserve_sglang.instance.store.kv_store import KvStore
from kunserve_sglang.instance.store.parameters import ParameterStore
from kunserve_sglang.transport import DataPlane, Packet
from kunserve_sglang.transport.data import Malformed
from kunserve_sglang.transport.forwarding import ForwardingPlane


class ScreenedPlane(ForwardingPlane):
    """A data plane of which only packets come that `Screen` lets pass."""

    def __init__(self, plane: DataPlane, screen: Screen) -> None:
        super().__init__(plane)
        self._screen = screen
        self._peers: Collection[int] = ()
        self._dropped = Dropped()

    @property
    def malformed(self) -> int:
        return super().malformed + self._dropped.count

    def connect(self, peers: Mapping[int, str]) -> None:
        super().connect(peers)
        self._peers = set(peers)

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        while (packet := super().receive(timeout_s)) is not None:
            try:
                self._screen.check(packet, self._peers)
            except Malformed as error:
                self._dropped.because(error)
            else:
                return packet
            timeout_s = 0.0
        return None


class Screen:
    """What does not depend on the moment: types, shapes, and numbers within what there is."""

    def __init__(self, kv: KvStore, parameters: ParameterStore) -> None:
        self._kv = kv
        self._parameters = parameters

    def check(self, packet: Packet, peers: Collection[int]) -> None:
        """Raises `Malformed`."""
        header, tensors = wire.decode(packet.header), packet.tensors
        _require(header.sender in peers, f"sent by {header.sender}")
        match header:
            case wire.MicroBatch():
                self._micro_batch(header, tensors)
            case wire.TakenSlots():
                self._taken_slots(tensors)
            case wire.KvRows():
                self._rows(header, tensors)
            case wire.LayerParameters():
                self._layer(header, tensors)

    def _micro_batch(self, header: wire.MicroBatch, tensors: list[torch.Tensor]) -> None:
        """Of a member's own that has come back, nothing is described."""
        count = 1 + header.has_residual
        described, hidden = tensors[:-count], tensors[-count:]
        _require(len(hidden) == count, "a micro-batch without hidden states")
        _require(len({(t.shape, t.dtype) for t in hidden}) == 1, "a residual of another shape")
        times = header.launched, header.cost_ms, header.round_ms
        _require(all(math.isfinite(t) and t >= 0 for t in times), f"times of {times}")
        _require(hidden[0].dim() == 2 and hidden[0].is_floating_point(), "no hidden states")
        packed = header.packed
        if packed is None:
            _require(not described, "a micro-batch with more than there is to it")
            return
        integers = _integers(packed.inline, described)
        sizes = (packed.requests, packed.tokens, packed.slots)
        _require(min(sizes) >= 0 and packed.requests > 0, f"a micro-batch of {sizes}")
        tables = 4 if packed.decode else 6
        needed = packed.requests * tables + 2 * packed.tokens + packed.slots
        _require(integers == needed, f"{integers} integers in place of {needed}")

    def _taken_slots(self, tensors: list[torch.Tensor]) -> None:
        _require(len(tensors) == 2, "slots without others")
        for slots in tensors:
            _require(slots.dim() == 1 and slots.dtype == torch.int64, "slots that are none")
            self._within(slots.cpu())
        _require(len(tensors[0]) == len(tensors[1]), "slots that do not become as many")

    def _rows(self, header: wire.KvRows, tensors: list[torch.Tensor]) -> None:
        shape, layers = self._kv.shape, header.layers
        _require(0 <= layers.lo < layers.hi <= shape.layers, f"rows of layers {layers}")
        _require(len(tensors) > 1, "rows without K and V")
        *beside, k, v = tensors
        count = _integers(header.slots, beside)
        for rows, dim in ((k, shape.key_dim), (v, shape.value_dim)):
            wanted = (len(layers), count, shape.heads, dim)
            _require(
                rows.shape == wanted and rows.dtype == shape.dtype, f"rows that are not {wanted}"
            )
        self._within(packing.integers_of(header.slots, [t.cpu() for t in beside]))

    def _layer(self, header: wire.LayerParameters, tensors: list[torch.Tensor]) -> None:
        _require(0 <= header.layer < len(self._parameters), f"layer {header.layer}")
        _require(
            len(tensors) == 1 and tensors[0].dim() == 1 and tensors[0].dtype == torch.uint8,
            "parameters that are no bytes",
        )
        end = header.offset + len(tensors[0])
        size = self._parameters.nbytes([header.layer])
        _require(header.offset >= 0 and end <= size, f"bytes up to {end} of {size}")

    def _within(self, slots: torch.Tensor) -> None:
        _require_within(slots, 0, self._kv.stride, "slots")


def check_hidden(hidden: Hidden, tokens: int, blank: torch.Tensor) -> None:
    """Whether layers that take hidden states like `blank` can go on with these.

    Raises `Malformed`.
    """
    found = hidden[0]
    if found.shape != (tokens, blank.shape[1]) or found.dtype != blank.dtype:
        raise Malformed(f"hidden states {tuple(found.shape)} of {found.dtype}")


def check_batch(batch: StageBatch, delta: TableDelta, *, table: Sequence[int], stride: int) -> None:
    """Whether a stage with a mirrored table of this shape can run it. Raises `Malformed`."""
    rows, context = table
    tokens = len(batch.positions)
    _require_within(batch.rows, 0, rows, "rows")
    _require_within(batch.seq_lens, 1, context + 1, "lengths")
    _require_within(batch.out_slots, 0, stride, "slots")
    _require_within(delta.slots, 0, stride, "slots")
    _require(bool((delta.starts >= 0).all() and (delta.lengths >= 0).all()), "negative lengths")
    _require_within(delta.starts + delta.lengths, 0, context + 1, "ends of rows")
    _require(int(delta.lengths.sum()) == len(delta.slots), "rows of other slots")
    if batch.prefix_lens is None or batch.extend_lens is None:
        _require(tokens == len(batch.rows), f"a step of {tokens} tokens")
    else:
        ends = batch.prefix_lens + batch.extend_lens
        fits = (batch.prefix_lens >= 0) & (batch.extend_lens > 0) & (ends == batch.seq_lens)
        _require(bool(fits.all()), "chunks that are not their requests'")
        _require(int(batch.extend_lens.sum()) == tokens, f"chunks of not {tokens} tokens")


def _integers(inline: bytes, beside: Sequence[Any]) -> int:
    """How many there are, as `packing.inlined` makes them."""
    if not beside:
        _require(len(inline) % 8 == 0, "half an integer")
        return len(inline) // 8
    integers = beside[0]
    _require(
        len(beside) == 1 and not inline and integers.dim() == 1 and integers.dtype == torch.int64,
        "integers that are none",
    )
    return len(integers)


def _require_within(numbers: torch.Tensor, low: int, high: int, name: str) -> None:
    if len(numbers):
        least, most = (int(x) for x in torch.aminmax(numbers))
        _require(low <= least and most < high, f"{name} {least} to {most}")


def _require(true: bool, reason: str) -> None:
    if not true:
        raise Malformed(reason)

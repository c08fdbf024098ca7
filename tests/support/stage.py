"""One member's part of a group, with a real memory, behind a wire that the test holds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.layout import LayerRange, Layout, Member, Move, ParameterLoad
from kunserve_sglang.instance.packets import packing, wire
from kunserve_sglang.instance.packets.request_table import TableDelta
from kunserve_sglang.instance.parts.engine import Hidden, StageBatch
from kunserve_sglang.instance.parts.instance_parts import InstanceParts
from kunserve_sglang.instance.pipeline.group_work import GroupWork
from kunserve_sglang.instance.pipeline.screening import Screen, ScreenedPlane
from kunserve_sglang.instance.store.kv_store import KvShape, KvStore, aligned_stride
from kunserve_sglang.instance.store.parameters import ParameterStore
from kunserve_sglang.instance.transfer.transfer import Transfer
from kunserve_sglang.memory import open_pool
from kunserve_sglang.transport import Packet

PAGE = 4096
HIDDEN = 6
EPOCH = 7
SHAPE = KvShape(layers=4, heads=2, key_dim=16, value_dim=8, dtype=torch.float32)
SLOTS = 200
LOWER, UPPER = LayerRange(0, 2), LayerRange(2, 4)
LAYOUT = Layout(
    epoch=EPOCH,
    members=(
        Member(instance=0, layers=LOWER, capacity=SLOTS, address="0"),
        Member(instance=1, layers=UPPER, capacity=SLOTS, address="1"),
    ),
)


class Engine:
    """Runs nothing, and says so."""

    layer_count = SHAPE.layers

    def __init__(self) -> None:
        self.ran = 0

    def request_table(self) -> torch.Tensor:
        return torch.zeros(8, 64, dtype=torch.int32)

    def blank_hidden(self, tokens: int) -> Hidden:
        return torch.zeros(tokens, HIDDEN), None

    def run_stage(self, batch: StageBatch, *rest: Any) -> Hidden:
        self.ran += 1
        hidden: Hidden = rest[-1]
        assert len(hidden[0]) == len(batch.positions)
        return hidden

    def settle(self) -> None:
        return None


@dataclass
class Wire:
    """A data plane of which a test says what arrives."""

    address: str = "1"
    malformed: int = 0
    arriving: deque[Packet] = field(default_factory=deque)
    sent: list[tuple[int, bytes]] = field(default_factory=list)

    def connect(self, peers: Mapping[int, str]) -> None:  # noqa: ARG002
        return None

    def send(
        self,
        peer: int,
        header: bytes,
        tensors: Sequence[torch.Tensor] = (),  # noqa: ARG002
        *,
        bulk: bool = False,  # noqa: ARG002
    ) -> None:
        self.sent.append((peer, header))

    def room(self, peer: int) -> int:  # noqa: ARG002
        return 1 << 20

    def window(self, peer: int) -> int:  # noqa: ARG002
        return 1 << 20

    def lost(self, peers: Collection[int]) -> str:  # noqa: ARG002
        return ""

    def receive(self, timeout_s: float = 0.0) -> Packet | None:  # noqa: ARG002
        return self.arriving.popleft() if self.arriving else None

    def poll_handles(self) -> list[Any]:
        return []

    def close(self) -> None:
        return None


class Stage:
    """Member 1 of a group of two, to which KV and a layer are on their way."""

    def __init__(self) -> None:
        pool = open_pool(torch.device("cpu"), 2000 * PAGE, page_bytes=PAGE)
        self.pool = pool
        self.parameters = ParameterStore(pool, [nn.Linear(20, 20) for _ in range(SHAPE.layers)])
        stride = aligned_stride(SLOTS, SHAPE, PAGE)
        self.kv = KvStore(pool, SHAPE, instance=1, stride=stride, owners=2)
        self.kv.admit(0)
        for layer in UPPER:
            self.kv.resize(layer, 0, SLOTS)
        self.parameters.drop(3)
        self.wire = Wire()
        self.plane = ScreenedPlane(self.wire, Screen(self.kv, self.parameters))
        self.plane.connect({0: "0"})
        self.engine = Engine()
        self.parts = InstanceParts(
            instance=1,
            profile=None,  # type: ignore[arg-type]
            pool=pool,
            parameters=self.parameters,
            kv=self.kv,
            engine=self.engine,  # type: ignore[arg-type]
            plane=self.plane,
            control=None,  # type: ignore[arg-type]
            costs=SimpleNamespace(observe=lambda *_: None),  # type: ignore[arg-type]
        )
        self.work = GroupWork(self.parts, check_for_losses=lambda: None, peer_timeout_s=0.0)
        self.begin()

    def begin(self) -> None:
        """As after a transition."""
        self.work.drop()
        self.work.begin(LAYOUT)
        self.parameters.cancel(3)
        transfer = Transfer(
            1,
            EPOCH,
            moves=[Move(0, UPPER, source=0, target=1)],
            loads=[ParameterLoad(3, source=0, target=1)],
            taken={0: torch.arange(1, 50)},
            serving=UPPER,
            kv=self.kv,
            parameters=self.parameters,
            plane=self.plane,
            clock=time.monotonic,
            timeout_s=0.0,
        )
        transfer.reserve(lambda _: SLOTS)
        self.work.transfer = transfer

    def takes(self, packet: Packet) -> None:
        """Whatever it is; what is missing before it makes the group come apart."""
        self.wire.arriving.append(packet)
        try:
            self.work.serve_one(0.0)
        except PeerLost:
            self.begin()


def micro_batch(sequence: int) -> Packet:
    """A step of two requests of owner 0, at the second stage."""
    rows, lengths = torch.tensor([1, 2]), torch.tensor([3, 2])
    batch = StageBatch(
        owner=0,
        rows=rows,
        seq_lens=lengths,
        positions=lengths - 1,
        out_slots=torch.tensor([103, 105]),
        prefix_lens=None,
        extend_lens=None,
    )
    slots = torch.tensor([101, 102, 103, 104, 105])
    packed, beside = packing.pack(
        batch, TableDelta(rows, torch.zeros(2, dtype=torch.int64), lengths, slots)
    )
    header = wire.MicroBatch(
        sender=0,
        epoch=EPOCH,
        owner=0,
        sequence=sequence,
        position=1,
        packed=packed,
        has_residual=True,
        launched=0.0,
        cost_ms=1.0,
        round_ms=2.0,
    )
    hidden = torch.ones(2, HIDDEN)
    return Packet(wire.encode(header), [*beside, hidden, hidden.clone()])


def valid_packets() -> list[Packet]:
    slots = torch.arange(1, 9)
    inline, _ = packing.inlined(slots)
    rows = wire.KvRows(sender=0, epoch=EPOCH, owner=0, layers=UPPER, slots=inline, number=0)
    layer = wire.LayerParameters(sender=0, epoch=EPOCH, layer=3, offset=0)
    taken = wire.TakenSlots(sender=0, epoch=EPOCH)
    home = wire.MicroBatch(
        sender=0,
        epoch=EPOCH,
        owner=1,
        sequence=0,
        position=2,
        packed=None,
        has_residual=False,
        launched=0.0,
        cost_ms=1.0,
        round_ms=2.0,
    )
    k = torch.ones(2, 8, SHAPE.heads, SHAPE.key_dim)
    return [
        micro_batch(0),
        micro_batch(1),
        Packet(wire.encode(rows), [k, k[..., : SHAPE.value_dim].clone()]),
        Packet(wire.encode(layer), [torch.ones(64, dtype=torch.uint8)]),
        Packet(wire.encode(taken), [slots, slots.clone()]),
        Packet(wire.encode(home), [torch.ones(2, HIDDEN)]),
    ]

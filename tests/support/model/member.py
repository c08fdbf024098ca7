"""One instance of a model: the product's agent, stores and pipeline; a made-up runtime."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import nn

from kunserve_sglang.core import faults
from kunserve_sglang.core.cost_model import CostEstimate, CostModel
from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.layout import LayerRange, MemoryProfile
from kunserve_sglang.core.messages import PROTOCOL_VERSION, Hello, connection_name
from kunserve_sglang.instance.agent.agent import Agent
from kunserve_sglang.instance.parts.control import ControlLink
from kunserve_sglang.instance.parts.instance_parts import InstanceParts
from kunserve_sglang.instance.pipeline.faulty import FaultyPlane
from kunserve_sglang.instance.store.kv_store import KvShape, KvStore
from kunserve_sglang.instance.store.parameters import ParameterStore
from kunserve_sglang.memory import PhysicalPagePool
from kunserve_sglang.transport import DataPlane
from kunserve_sglang.transport.checked import SEAL_BYTES, CheckedPlane
from tests.support.model.clock import Sleeper
from tests.support.model.engine import ROWS, ModelEngine
from tests.support.model.network import MemberSocket, ModelPlane, RouterLine, Weather

LAYERS = 4
_PAGE = 1024
_STRIDE = 256
_OWNERS = 4
_LAYER_PAGES = 9
_WHAT_WAS_THERE = 0x5A
_TURN_S = 0.5
_WORK_S = 0.05
PEER_TIMEOUT_S = 8.0

_COSTS = CostModel(prefill=(0.0,) * 6, decode=(1.0, 1.0, 0.0))


class PlainPages:
    """Pages that are counted: memory is there whether it is mapped or not, but of what was in it
    nothing is left when it is mapped."""

    page_bytes = _PAGE

    def __init__(self) -> None:
        self._memory: dict[int, torch.Tensor] = {}

    def commit(self, pages: int) -> None:
        """There is enough."""

    def reclaim(self) -> None:
        """Nothing is kept."""

    def reserve(self, nbytes: int) -> int:
        address = 1 << 30 if not self._memory else max(self._memory) + (1 << 30)
        self._memory[address] = torch.zeros(nbytes, dtype=torch.uint8)
        return address

    def release(self, address: int, nbytes: int) -> None:  # noqa: ARG002
        del self._memory[address]

    def map(self, address: int, pages: Sequence[int]) -> None:
        base = max(start for start in self._memory if start <= address)
        first = address - base
        self._memory[base][first : first + len(pages) * _PAGE] = _WHAT_WAS_THERE

    def mappable(self) -> int:
        return 1 << 30

    def unmap(self, address: int, count: int) -> None:
        """It stays there."""

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        return self._memory[address][:nbytes]

    def close(self) -> None:
        self._memory.clear()


def _same_everywhere(layer: nn.Linear, number: int) -> nn.Linear:
    """Parameters that all instances have alike, as of one model."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + number)
    return layer


def _checked(plane: DataPlane, number: int) -> DataPlane:
    """As `sglang_seam.assembly` makes it: packets can get lost or spoilt, and that is noticed."""
    if faults.armed():
        plane = FaultyPlane(plane, me=number, seal_bytes=SEAL_BYTES)
    return CheckedPlane(plane)


class ModelMember:
    """An instance whose scheduler takes turns, as long as it is not stopped or dead."""

    def __init__(
        self,
        number: int,
        process: int,
        *,
        router: Callable[[], RouterLine],
        planes: dict[int, ModelPlane],
        weather: Weather,
        chance: random.Random,
        kv_pages: int,
    ) -> None:
        self.number = number
        self._chance = chance
        self.serving = True
        self.sleeper = Sleeper(weather.loop, self._live)
        self.socket = MemberSocket(connection_name(number), router, self.sleeper)
        self.plane = ModelPlane(number, planes, weather, self.sleeper)
        clock = weather.loop.time
        layers = [_same_everywhere(nn.Linear(32, 64), layer) for layer in range(LAYERS)]
        shape = KvShape(LAYERS, heads=1, key_dim=64, value_dim=64, dtype=torch.float32)
        pool = PhysicalPagePool(PlainPages(), LAYERS * (_LAYER_PAGES + kv_pages))
        self.parameters = ParameterStore(pool, layers)
        self._whole = [self.parameters.bytes_of(layer).clone() for layer in range(LAYERS)]
        kv = KvStore(pool, shape, instance=number, stride=_STRIDE, owners=_OWNERS)
        profile = MemoryProfile(
            page_bytes=_PAGE,
            pages=pool.total,
            layer_pages=self.parameters.layer_pages(),
            key_row_bytes=shape.key_row_bytes,
            value_row_bytes=shape.value_row_bytes,
            stride=_STRIDE,
            owners=_OWNERS,
        )
        capacity = profile.capacity(LayerRange(0, LAYERS), 1)
        for layer in range(LAYERS):
            kv.resize(layer, number, capacity)
        self.engine = ModelEngine(
            LAYERS,
            self.parameters,
            kv,
            lambda layer: self._refill(layer, self._whole[layer]),
            clock,
            capacity,
        )
        self.engine.owner = number
        hello = Hello(
            version=PROTOCOL_VERSION,
            instance=number,
            url=f"http://member-{number}:1",
            data_address=self.plane.address,
            scheduler="model",
            layer_count=LAYERS,
            memory=profile,
            capacity=capacity,
            costs=_COSTS,
            process=process,
        )
        body = InstanceParts(
            instance=number,
            profile=profile,
            pool=pool,
            parameters=self.parameters,
            kv=kv,
            engine=self.engine,
            plane=_checked(self.plane, number),
            control=ControlLink(self.socket, "model", hello, now=clock),
            costs=CostEstimate(_COSTS),
            clock=clock,
            process=process,
        )
        self.agent = Agent(body, peer_timeout_s=PEER_TIMEOUT_S, now=clock)
        self.engine.agent = self.agent

    def _refill(self, layer: int, data: torch.Tensor) -> None:
        self.parameters.bytes_of(layer).copy_(data)

    @property
    def at_rest(self) -> bool:
        """Whether it waits for nobody, and does not just stand still."""
        at_rest = self.agent.status().mode in ("independent", "cooperative")
        return at_rest and not self.sleeper.stopped

    def kill(self) -> None:
        self.sleeper.kill()
        self.plane.close()

    def _live(self) -> None:
        while not self.engine.ended:
            self.agent.poll()
            self._check()
            try:
                busy = self._turn()
            except PeerLost as error:
                self.agent.leave_group(str(error))
                busy = True
            if not busy:
                self.agent.before_sleep()
            self.sleeper.sleep(_WORK_S if busy else _TURN_S)
        self.plane.close()

    def _turn(self) -> bool:
        """As the scheduler's; true if something was done."""
        agent, engine = self.agent, self.engine
        busy = False
        if engine.cooperating and not agent.abandoned:
            while engine.collect():
                busy = True
        if self.serving and not agent.abandoned and self._chance.random() < 0.3:
            engine.step(self._chance.sample(range(ROWS), self._chance.randrange(1, ROWS)))
            busy = True
        if not self.serving or self._chance.random() < 0.05:
            engine.finish()
        if engine.cooperating:
            while agent.serve_one():
                busy = True
            busy |= agent.move_pieces(_WORK_S)
        return busy

    def _check(self) -> None:
        """Whoever could serve holds what it is to run (invariant 2)."""
        if self.agent.abandoned:
            return
        layout = self.agent.status().layout
        assert layout.covers(LAYERS)
        mine = layout.member(self.number).layers
        missing = set(mine) - set(self.parameters.held())
        assert not missing, f"instance {self.number} runs {mine} without {missing}"
        for layer in mine:
            found = self.parameters.bytes_of(layer)
            assert torch.equal(found, self._whole[layer]), f"layer {layer} is not what it was"
        assert self.engine.cooperating == layout.cooperative

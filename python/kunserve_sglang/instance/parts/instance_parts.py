"""The parts of an instance that carry layers and KV, as one argument."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kunserve_sglang.core.cost_model import CostEstimate
from kunserve_sglang.core.errors import InternalError, PeerLost
from kunserve_sglang.core.layout import LayerRange, Layout, Member, MemoryProfile
from kunserve_sglang.core.load import Pages
from kunserve_sglang.core.messages import Transition
from kunserve_sglang.instance.parts.control import Control
from kunserve_sglang.instance.parts.engine import Engine
from kunserve_sglang.instance.store.kv_store import KvStore
from kunserve_sglang.instance.store.parameters import ParameterStore
from kunserve_sglang.memory import PhysicalPagePool
from kunserve_sglang.transport import DataPlane


@dataclass(frozen=True, slots=True)
class InstanceParts:
    """What an agent is the head of; of an instance with several ranks, one rank's part.

    All ranks decide by `clock`, in monotonic seconds; rank 0 speaks for the instance, as `process`
    (`messages.Hello`).
    """

    instance: int
    profile: MemoryProfile
    pool: PhysicalPagePool
    parameters: ParameterStore
    kv: KvStore
    engine: Engine
    plane: DataPlane
    control: Control
    costs: CostEstimate
    clock: Callable[[], float] = time.monotonic
    rank: int = 0
    process: int = 0

    def connect(self, transition: Transition, group: Sequence[int]) -> None:
        """To all that take part in it. Raises `PeerLost` if there is no way to one.

        So it does if one to the `group` that there is has ended: what was on it does not come
        again, and a new one would hide that.
        """
        self._check_connections(group)
        layouts = (*transition.before, *transition.after)
        members = {m.instance: m.address for layout in layouts for m in layout.members}
        del members[self.instance]
        self.plane.connect(members)

    def check_for_losses(self, epoch: int, peers: Sequence[int]) -> None:
        """To be asked by whoever waits for `peers`, who runs by the layout of `epoch`.

        Raises `PeerLost` if that is in vain: the router has said so, or a connection has ended.
        """
        self.control.check_for_losses(epoch)
        self._check_connections(peers)

    def _check_connections(self, peers: Sequence[int]) -> None:
        if why := self.plane.lost([peer for peer in peers if peer != self.instance]):
            raise PeerLost(why)

    def pages(self) -> Pages:
        """What the memory of this instance is used for."""
        return Pages(
            parameters=self.parameters.pages,
            kv=self.kv.pages,
            free=self.pool.free,
            total=self.pool.total,
        )

    def check_pages(self) -> None:
        """No page is lost or in use twice; raises `InternalError`."""
        pages = self.pages()
        if pages.parameters + pages.kv + pages.free != pages.total:
            raise InternalError(f"pages are not conserved: {pages}")

    def alone(self, epoch: int) -> Layout:
        """The layout, of this epoch, in which this instance has all layers and no group."""
        layers = LayerRange(0, self.engine.layer_count)
        member = Member(
            instance=self.instance,
            layers=layers,
            capacity=self.profile.capacity(layers, 1),
            address=self.plane.address,
        )
        return Layout(epoch=epoch, members=(member,))

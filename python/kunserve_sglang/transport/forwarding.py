"""A data plane around another one, which does all that it does not do itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from kunserve_sglang.core.sockets import PollHandle
from kunserve_sglang.transport.data import DataPlane, Packet, Tensors


class ForwardingPlane:
    """A `DataPlane`; what is made of it changes some of the calls."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self.address = plane.address

    @property
    def malformed(self) -> int:
        return self._plane.malformed

    def connect(self, peers: Mapping[int, str]) -> None:
        self._plane.connect(peers)

    def send(self, peer: int, header: bytes, tensors: Tensors = (), *, bulk: bool = False) -> None:
        self._plane.send(peer, header, tensors, bulk=bulk)

    def room(self, peer: int) -> int:
        return self._plane.room(peer)

    def window(self, peer: int) -> int:
        return self._plane.window(peer)

    def lost(self, peers: Collection[int]) -> str:
        return self._plane.lost(peers)

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        return self._plane.receive(timeout_s)

    def poll_handles(self) -> list[PollHandle]:
        return self._plane.poll_handles()

    def close(self) -> None:
        self._plane.close()

"""The data plane of an instance: shared memory to peers of this host, TCP to the others.

On a GPU, memory of that GPU is shared, among the instances that it serves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import torch
import zmq

from kunserve_sglang.errors import InternalError, PeerLost
from kunserve_sglang.keys import MemberKeys
from kunserve_sglang.memory.cuda_driver import CudaDevice
from kunserve_sglang.processes import this_host, within_reach
from kunserve_sglang.transport.cuda_ring import CudaRings
from kunserve_sglang.transport.data import DataPlane, Packet
from kunserve_sglang.transport.local import LocalDataPlane
from kunserve_sglang.transport.ring import HostRings, Rings
from kunserve_sglang.transport.tcp import TcpDataPlane

_CPU = torch.device("cpu")


class PeerAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where an instance can be reached; travels as JSON in the members' `address`."""

    host: str
    path: str
    tcp: str = ""
    gpu: str = ""


def gpu_of(device: torch.device) -> str:
    """Names a GPU among all machines; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def rings_on(device: torch.device) -> Rings:
    """Rings that lie where tensors on `device` do."""
    if device.type == "cuda":
        return CudaRings(partial(CudaDevice, device.index or 0))
    return HostRings()


class HostAwareDataPlane:
    """Chooses the way to each peer by its address.

    A peer is local if it runs on the same kernel, on the same GPU if on any, and its socket is
    visible here: two containers of one machine with folders of their own talk TCP.
    """

    def __init__(
        self,
        path: str,
        *,
        tcp: str = "",
        keys: MemberKeys | None = None,
        host: str = "",
        device: torch.device = _CPU,
    ) -> None:
        """`tcp` is an address to listen at for members on other hosts, who show `keys`.

        Without both there are none. `host` stands for this host if it is given. Tensors are
        received on `device`.
        """
        self._host = host or this_host()
        self._gpu = gpu_of(device)
        self._local = LocalDataPlane(path, rings=rings_on(device))
        self._context: zmq.Context[Any] = zmq.Context()
        self._tcp = TcpDataPlane(self._context, tcp, keys, device) if tcp and keys else None
        address = PeerAddress(
            host=self._host, path=path, tcp=self._tcp.address if self._tcp else "", gpu=self._gpu
        )
        self.address = msgspec.json.encode(address).decode()
        self._ways: dict[int, DataPlane] = {}
        self._poller = zmq.Poller()
        for handle in self.poll_handles():
            self._poller.register(handle, zmq.POLLIN)

    def connect(self, peers: Mapping[int, str]) -> None:
        addresses = {
            peer: msgspec.json.decode(address, type=PeerAddress) for peer, address in peers.items()
        }
        local = {peer: a.path for peer, a in addresses.items() if self._is_local(a)}
        distant = {peer: a.tcp for peer, a in addresses.items() if peer not in local}
        if distant and (self._tcp is None or not all(distant.values())):
            raise PeerLost(f"instances {sorted(distant)} share no memory with us, and TCP is off")
        self._local.connect(local)
        self._ways = dict.fromkeys(local, self._local)
        if self._tcp is not None:
            self._tcp.connect(distant)
            self._ways |= dict.fromkeys(distant, self._tcp)

    def send(self, peer: int, header: bytes, tensors: Sequence[torch.Tensor] = ()) -> None:
        if peer not in self._ways:
            raise InternalError(f"instance {peer} is not connected")
        self._ways[peer].send(peer, header, tensors)

    def room(self, peer: int) -> int:
        return self._ways[peer].room(peer)

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        if self._tcp is None:
            return self._local.receive(timeout_s)
        deadline = time.monotonic() + timeout_s
        while (packet := self._local.receive() or self._tcp.receive()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._poller.poll(math.ceil(1000 * left))
        return packet

    def poll_handles(self) -> list[Any]:
        return [handle for way in self._all() for handle in way.poll_handles()]

    def close(self) -> None:
        for way in self._all():
            way.close()
        self._context.term()

    def _all(self) -> list[DataPlane]:
        return [self._local, *([self._tcp] if self._tcp else [])]

    def _is_local(self, address: PeerAddress) -> bool:
        reachable = within_reach(address.host, self._host, address.path)
        return reachable and address.gpu == self._gpu

"""The data plane of an instance: shared memory, NCCL or TCP, whatever suits each peer.

On a GPU, memory of that GPU is shared, among the instances that it serves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import msgspec
import torch
import zmq

from kunserve_sglang.core.errors import InternalError, PeerLost
from kunserve_sglang.core.keys import MemberKeys
from kunserve_sglang.core.processes import this_host
from kunserve_sglang.core.sockets import PollHandle
from kunserve_sglang.core.transports import Transport
from kunserve_sglang.memory.cuda_driver import CudaDevice
from kunserve_sglang.transport.choice import PeerAddress, Way, way_between
from kunserve_sglang.transport.cuda_ring import CudaRings
from kunserve_sglang.transport.data import DataPlane, Packet, Tensors
from kunserve_sglang.transport.local import LocalDataPlane
from kunserve_sglang.transport.nccl import NcclDataPlane
from kunserve_sglang.transport.ring import HostRings, Rings
from kunserve_sglang.transport.tcp import TcpDataPlane
from kunserve_sglang.transport.windows import ON_GPU, ON_HOST, Windows

_CPU = torch.device("cpu")
_LOOPBACK = "127.0.0.1"


def gpu_of(device: torch.device) -> str:
    """Names a GPU among all machines; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def rings_on(device: torch.device) -> Rings:
    """Rings that lie where tensors on `device` do."""
    if device.type == "cuda":
        return CudaRings(partial(CudaDevice, device.index or 0))
    return HostRings()


class HostAwareDataPlane:
    """Chooses the way to each peer by its address (`choice.way_between`)."""

    def __init__(
        self,
        path: str,
        *,
        tcp: str = "",
        keys: MemberKeys | None = None,
        host: str = "",
        device: torch.device = _CPU,
        transport: Transport = Transport.AUTO,
        windows: Windows | None = None,
    ) -> None:
        """`tcp` is an address to listen at for members on other hosts, who show `keys`.

        Without both there are none. `host` stands for this host if it is given. Tensors are
        received on `device`. `windows` are the largest by default.
        """
        self._wanted = transport
        self._context: zmq.Context[Any] = zmq.Context()
        self._windows = windows = windows or (ON_HOST if device.type == "cpu" else ON_GPU)
        self._local = LocalDataPlane(
            path,
            ring_bytes=windows.activations,
            bulk_bytes=windows.bulk,
            rings=rings_on(device),
        )
        self._tcp: TcpDataPlane | None = None
        if tcp and keys:
            self._tcp = TcpDataPlane(self._context, tcp, keys, device, windows.bulk)
        self._nccl: NcclDataPlane | None = None
        # With host memory it is there for those who ask for it: shared memory is faster.
        if transport is Transport.NCCL or (transport is Transport.AUTO and device.type == "cuda"):
            self._nccl = _nccl(path, tcp, keys, device)
        self._address = PeerAddress(
            host=host or this_host(),
            path=path,
            tcp=self._tcp.address if self._tcp else "",
            gpu=gpu_of(device),
            nccl=self._nccl.address if self._nccl else "",
        )
        self.address = msgspec.json.encode(self._address).decode()
        self._ways: dict[int, DataPlane] = {}
        self._poller = zmq.Poller()
        for handle in self.poll_handles():
            self._poller.register(handle, zmq.POLLIN)

    @property
    def malformed(self) -> int:
        return sum(plane.malformed for plane in self._planes().values())

    def connect(self, peers: Mapping[int, str]) -> None:
        addresses = {
            peer: msgspec.json.decode(address, type=PeerAddress) for peer, address in peers.items()
        }
        ways = {p: way_between(self._address, a, self._wanted) for p, a in addresses.items()}
        if unreachable := sorted(peer for peer, way in ways.items() if way is None):
            raise PeerLost(f"instances {unreachable} {self._why_not()}")
        if self._tcp is not None:
            self._tcp.bulk_window = self._windows.bulk_among(len(addresses))
        self._ways = {}
        for way, plane in self._planes().items():
            mine = {p: a.at(way) for p, a in addresses.items() if ways[p] is way}
            plane.connect(mine)
            self._ways |= dict.fromkeys(mine, plane)

    def send(self, peer: int, header: bytes, tensors: Tensors = (), *, bulk: bool = False) -> None:
        if peer not in self._ways:
            raise InternalError(f"instance {peer} is not connected")
        self._ways[peer].send(peer, header, tensors, bulk=bulk)

    def room(self, peer: int) -> int:
        return self._ways[peer].room(peer)

    def window(self, peer: int) -> int:
        return self._ways[peer].window(peer)

    def lost(self, peers: Collection[int]) -> str:
        return next((why for p in peers if (why := self._ways[p].lost([p]))), "")

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        if self._tcp is None and self._nccl is None:
            return self._local.receive(timeout_s)
        deadline = time.monotonic() + timeout_s
        while (packet := self._next()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._poller.poll(math.ceil(1000 * left))
        return packet

    def poll_handles(self) -> list[PollHandle]:
        return [handle for plane in self._planes().values() for handle in plane.poll_handles()]

    def close(self) -> None:
        for plane in self._planes().values():
            plane.close()
        self._context.term()

    def _next(self) -> Packet | None:
        packets = (plane.receive() for plane in self._planes().values())
        return next((packet for packet in packets if packet is not None), None)

    def _planes(self) -> dict[Way, DataPlane]:
        planes = {Way.MEMORY: self._local, Way.NCCL: self._nccl, Way.TCP: self._tcp}
        return {way: plane for way, plane in planes.items() if plane is not None}

    def _why_not(self) -> str:
        if self._wanted is Transport.AUTO:
            return "share no memory with us, and TCP is off"
        return f"cannot be reached with --transport {self._wanted}"


def _nccl(path: str, tcp: str, keys: MemberKeys | None, device: torch.device) -> NcclDataPlane:
    """An NCCL plane; it listens to other hosts only if TCP does."""
    if tcp and keys:
        host = tcp.removeprefix("tcp://").rpartition(":")[0]
        return NcclDataPlane(f"tcp://{host}:*", keys=keys, device=device, host=host.strip("[]"))
    return NcclDataPlane(f"ipc://{path}-news", keys=None, device=device, host=_LOOPBACK)

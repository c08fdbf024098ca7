"""Data plane between GPUs: tensors through NCCL, by `torch.distributed`; news of them by ZMQ.

Threads pass the bytes on, one for each peer that is sent to and one for all that arrives. So a send
ends soon whatever the scheduler of its receiver does. Nothing is announced before it is complete:
the kernel that receives it waits for a copy, never for what a peer computes. So a scheduler that
waits for its whole GPU, as unmapping does, is waited for by nobody, not even where ranks wait for
one another in a collective. Neither thread asks for memory without bounds: what is too much waits
in host memory.

On a CPU the same runs over gloo. What passes is not encrypted, only the news of it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import threading
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import torch
import zmq

from kunserve_sglang.core.dropped import Dropped
from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.keys import MemberKeys
from kunserve_sglang.core.sockets import PollHandle
from kunserve_sglang.transport.data import Malformed, Packet, Tensors, TensorSpec
from kunserve_sglang.transport.lane import Lane, Rendezvous, has_happened, visit
from kunserve_sglang.transport.news import Closed, LaneAddress, Open, Sent, heard, news_of
from kunserve_sglang.transport.outboxes import Outboxes
from kunserve_sglang.transport.ring import pack, packed_bytes, unpack
from kunserve_sglang.transport.sockets import PacketSockets

logger = logging.getLogger(__name__)

ROOM_BYTES = 16 << 20
"""On the device, for packets to one peer; and for those that arrived and nobody has taken yet."""

_CLOSE_S = 5.0
_LAST_WORD_MS = 200
_ENDS = (PeerLost, RuntimeError)
"""Errors that end one lane only; torch raises the second if a GPU is out of memory."""

_CPU = torch.device("cpu")


class NcclDataPlane:
    """One inbox for everything that arrives, one lane to each peer."""

    def __init__(
        self, news: str, *, keys: MemberKeys | None, device: torch.device, host: str
    ) -> None:
        """`news` is a ZMQ address to listen at, on which members show `keys` if there are any.

        Senders meet this instance at `host`, an address of this machine. Tensors are sent from
        anywhere and received on `device`.
        """
        self._context: zmq.Context[Any] = zmq.Context()
        self._sockets = PacketSockets(self._context, keys)
        self._inbox = _LaneInbox(self._sockets, news, Rendezvous(host), device)
        self._outboxes = Outboxes(lambda address: _LaneOutbox(self._sockets, address, device))
        self.address = msgspec.json.encode(self._inbox.address).decode()

    @property
    def malformed(self) -> int:
        return self._inbox.dropped.count

    def connect(self, peers: Mapping[int, str]) -> None:
        self._outboxes.connect(peers)

    def send(self, peer: int, header: bytes, tensors: Tensors = (), *, bulk: bool = False) -> None:
        del bulk  # one lane for all: what has room on the device passes in a moment
        self._outboxes[peer].send(header, list(tensors))

    def room(self, peer: int) -> int:
        return self._outboxes[peer].room

    def window(self, peer: int) -> int:  # noqa: ARG002
        return ROOM_BYTES

    def lost(self, peers: Collection[int]) -> str:
        return next((why for p in peers if (why := self._outboxes[p].lost)), "")

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        return self._inbox.receive(timeout_s)

    def poll_handles(self) -> list[PollHandle]:
        return [self._inbox.arrived]

    def close(self) -> None:
        self.connect({})
        self._inbox.close()
        self._sockets.close()
        self._context.term()


@dataclass(frozen=True, slots=True)
class _Leaving:
    """A packet on its way: copies of its tensors, flat, complete when `ready` happens."""

    header: bytes
    specs: tuple[TensorSpec, ...]
    memory: torch.Tensor | None
    ready: torch.cuda.Event | None


class _LaneOutbox:
    """Sender's end of a lane, with the thread that passes packets on."""

    def __init__(self, sockets: PacketSockets, address: str, device: torch.device) -> None:
        """Raises `PeerLost` if nobody is there."""
        self.address = address
        self._sockets = sockets
        self._to = msgspec.json.decode(address, type=LaneAddress)
        self._store = visit(self._to.store)
        self._device = device
        self.lost = ""
        self._queue: queue.SimpleQueue[_Leaving | None] = queue.SimpleQueue()
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="kunserve-send", daemon=True)
        self._thread.start()

    @property
    def room(self) -> int:
        return max(0, ROOM_BYTES - self._queued_bytes)

    def send(self, header: bytes, tensors: list[torch.Tensor]) -> None:
        if self.lost:
            raise PeerLost(self.lost)
        specs = tuple(TensorSpec.of(t) for t in tensors)
        memory, ready = None, None
        if nbytes := packed_bytes(t.nbytes for t in tensors):
            memory = torch.empty(
                nbytes, dtype=torch.uint8, device=self._device if self.room >= nbytes else _CPU
            )
            pack(memory, tensors)
            if memory.is_cuda:
                ready = torch.cuda.current_stream(self._device).record_event()
            with self._lock:
                self._queued_bytes += nbytes
        self._queue.put(_Leaving(header, specs, memory, ready))

    def close(self) -> None:
        """What was sent still passes, if the peer takes it in time."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        name = uuid4().hex
        news = self._sockets.outbox()
        news.connect(self._to.news)
        news.setsockopt(zmq.LINGER, _LAST_WORD_MS)
        try:
            news.send(news_of(Open(name)))
            lane = Lane(name, self._store, self._device, sending=True)
            while (leaving := self._queue.get()) is not None:
                self._pass_on(leaving, name, lane, news)
            news.send(news_of(Closed(name)))
            lane.close()
        except _ENDS as error:
            self.lost = str(error)
            logger.warning("%s", error)
        finally:
            news.close()

    def _pass_on(self, leaving: _Leaving, name: str, lane: Lane, news: zmq.Socket[bytes]) -> None:
        memory = leaving.memory
        nbytes = 0 if memory is None else memory.nbytes
        if leaving.ready is not None and not has_happened(leaving.ready):
            raise PeerLost("what was to be sent to a peer was not computed in time")
        news.send(news_of(Sent(name, leaving.header, leaving.specs, nbytes)))
        if memory is not None:
            lane.send(memory.to(self._device))
            with self._lock:
                self._queued_bytes -= nbytes


@dataclass(frozen=True, slots=True)
class _ArrivedPacket:
    header: bytes
    specs: tuple[TensorSpec, ...]
    memory: torch.Tensor


class _LaneInbox:
    """Receiver's end of all lanes, with the thread that takes packets in, in the order sent."""

    def __init__(
        self, sockets: PacketSockets, news: str, rendezvous: Rendezvous, device: torch.device
    ) -> None:
        self._socket = sockets.inbox(news)
        endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.address = LaneAddress(news=endpoint, store=rendezvous.address)
        self._rendezvous = rendezvous
        self._device = device
        self._lanes: dict[str, Lane] = {}
        self.dropped = Dropped()
        self._packets: deque[_ArrivedPacket] = deque()
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self.arrived = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE | os.EFD_CLOEXEC)
        self._poller = select.poll()
        self._poller.register(self.arrived, select.POLLIN)
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="kunserve-receive", daemon=True)
        self._thread.start()

    def receive(self, timeout_s: float) -> Packet | None:
        # Not by the queue: what is there may not have been counted yet.
        if not self._poller.poll(1e3 * timeout_s):
            return None
        os.eventfd_read(self.arrived)
        packet = self._packets.popleft()
        memory = packet.memory
        with self._lock:
            self._waiting_bytes -= memory.nbytes
        if memory.is_cuda:
            memory.record_stream(torch.cuda.current_stream(memory.device))
        return Packet(packet.header, unpack(memory.to(self._device), packet.specs))

    def close(self) -> None:
        os.eventfd_write(self._end, 1)
        self._thread.join(_CLOSE_S)
        os.close(self._end)
        os.close(self.arrived)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._end, zmq.POLLIN)
        while self._end not in dict(poller.poll()):
            try:
                news = heard(self._socket.recv())
            except Malformed as error:
                self.dropped.because(error)
                continue
            try:
                self._hear(news)
            except _ENDS as error:
                # Whoever waits for its packets finds out by itself.
                logger.warning("%s", error)
                self._leave(news.lane)
        for lane in self._lanes.values():
            lane.close()
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            if self.address.news.startswith("ipc://"):
                Path(self.address.news.removeprefix("ipc://")).unlink()

    def _hear(self, news: Open | Sent | Closed) -> None:
        if isinstance(news, Open):
            store = self._rendezvous.store
            self._lanes[news.lane] = Lane(news.lane, store, self._device, sending=False)
        elif isinstance(news, Closed):
            self._leave(news.lane)
        elif news.lane in self._lanes:
            self._take_in(self._lanes[news.lane], news)

    def _leave(self, name: str) -> None:
        if (lane := self._lanes.pop(name, None)) is not None:
            lane.close()

    def _take_in(self, lane: Lane, news: Sent) -> None:
        memory = lane.new_memory(news.nbytes, self._device)
        if news.nbytes:
            lane.receive(memory)
            if self._waiting_bytes + news.nbytes > ROOM_BYTES:
                memory = memory.cpu()
        with self._lock:
            self._waiting_bytes += news.nbytes
        self._packets.append(_ArrivedPacket(news.header, news.specs, memory))
        os.eventfd_write(self.arrived, 1)

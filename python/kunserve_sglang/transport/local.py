"""Data plane between instances of one host: tensors in shared memory, news of them by socket.

Every connection is a Unix socket of ordered messages beside a ring of shared memory. The thread
that sends wakes the thread that receives, with no helper threads in between: an instance computes
on one or two pinned cores, where a helper would wait for the computation it is to announce.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path

from kunserve_sglang.core.dropped import Dropped
from kunserve_sglang.core.sockets import PollHandle
from kunserve_sglang.transport import ring
from kunserve_sglang.transport.data import Malformed, Packet, Tensors
from kunserve_sglang.transport.outboxes import Outboxes
from kunserve_sglang.transport.ring_ends import RingInbox, RingOutbox
from kunserve_sglang.transport.windows import ON_HOST

_GONE = select.EPOLLHUP | select.EPOLLERR


class LocalDataPlane:
    """A listening socket for all peers, and connections to each peer that is sent to.

    Bulk has one of its own: in one ring, what a peer has not let go of yet would be in its way.
    """

    def __init__(
        self,
        path: str,
        *,
        ring_bytes: int = ON_HOST.activations,
        bulk_bytes: int = 0,
        rings: ring.Rings | None = None,
        shares_tail: bool | None = None,
    ) -> None:
        """Listen at `path`, a name for a socket file that does not exist yet.

        A peer gets a ring of `ring_bytes` bytes, and one of `bulk_bytes` for bulk; with 0, that
        shares the first. `rings` says in whose memory packets lie; both ends of a connection must
        agree. `shares_tail` is as `ring.tail_is_shared` by default.
        """
        self.address = path
        self._rings = rings or ring.HostRings()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._inboxes: dict[int, RingInbox] = {}
        self._shares_tail = ring.tail_is_shared() if shares_tail is None else shares_tail
        self._outboxes = self._bulk = self._outboxes_with(ring_bytes)
        if bulk_bytes:
            self._bulk = self._outboxes_with(bulk_bytes)

        self._dropped = Dropped()

    @property
    def malformed(self) -> int:
        return self._dropped.count

    def connect(self, peers: Mapping[int, str]) -> None:
        self._outboxes.connect(peers)
        self._bulk.connect(peers)

    def send(self, peer: int, header: bytes, tensors: Tensors = (), *, bulk: bool = False) -> None:
        (self._bulk if bulk else self._outboxes)[peer].send(header, list(tensors))

    def room(self, peer: int) -> int:
        return self._bulk[peer].room

    def window(self, peer: int) -> int:
        return self._bulk[peer].window

    def lost(self, peers: Collection[int]) -> str:  # noqa: ARG002
        return ""  # of a process on this host the router knows as soon as anybody

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        if not self._shares_tail:
            for sender in self._inboxes.values():
                sender.tell_tail()
        # One event at a time: what is not taken stays in the kernel, visible to `poll_handles`.
        while events := self._epoll.poll(timeout_s, 1):
            number, happened = events[0]
            if number == self._listener.fileno():
                self._accept()
            elif (inbox := self._inboxes.get(number)) is not None:
                try:
                    if (packet := inbox.receive()) is not None:
                        return packet
                except Malformed as error:
                    self._dropped.because(error)
                if inbox.ended:
                    self._epoll.unregister(number)
                    self._inboxes.pop(number).close()
            else:
                self._outbox(number).flush(gone=bool(happened & _GONE))
        return None

    def poll_handles(self) -> list[PollHandle]:
        return [self._epoll.fileno()]

    def close(self) -> None:
        self.connect({})
        for inbox in self._inboxes.values():
            inbox.close()
        self._inboxes.clear()
        self._epoll.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            Path(self.address).unlink()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._inboxes[connection.fileno()] = RingInbox(connection, self._rings, self._shares_tail)
        self._epoll.register(connection, select.EPOLLIN)

    def _outbox(self, number: int) -> RingOutbox:
        return next(o for o in chain(self._outboxes, self._bulk) if o.fileno() == number)

    def _outboxes_with(self, ring_bytes: int) -> Outboxes[RingOutbox]:
        shares = self._shares_tail
        return Outboxes(lambda path: RingOutbox(path, self._rings, ring_bytes, self._epoll, shares))

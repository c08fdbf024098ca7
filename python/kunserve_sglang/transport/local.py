"""Data plane between instances of one host: tensors in shared memory, news of them by socket.

Every connection is a Unix socket of ordered messages beside a ring of shared memory. The thread
that sends wakes the thread that receives, with no helper threads in between: an instance computes
on one or two pinned cores, where a helper would wait for the computation it is to announce.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from kunserve_sglang.core.errors import InternalError, PeerLost
from kunserve_sglang.transport import ring
from kunserve_sglang.transport.data import Packet, TensorSpec
from kunserve_sglang.transport.outboxes import Outboxes

RING_BYTES = 16 << 20
"""Room for activations in flight, per pair of instances; only what is used becomes resident."""

_MESSAGE_BYTES = 128 << 10
_MAX_FILES = 253
_CONNECT_TIMEOUT_S = 5.0
_GONE = select.EPOLLHUP | select.EPOLLERR


class _Note(msgspec.Struct, frozen=True, array_like=True):
    """One message: a packet whose tensors lie at `[start, end)`.

    The place is the ring's, or that of a file that comes with the message if `own_file`: tensors
    that find no room in the ring travel in a memory file of their own.
    """

    header: bytes
    specs: tuple[TensorSpec, ...]
    start: int
    end: int
    own_file: bool


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Note)


class LocalDataPlane:
    """A listening socket for all peers, and one connection for each peer that is sent to."""

    def __init__(
        self, path: str, *, ring_bytes: int = RING_BYTES, rings: ring.Rings | None = None
    ) -> None:
        """Listen at `path`, a name for a socket file that does not exist yet.

        `rings` says in whose memory packets lie; both ends of a connection must agree.
        """
        self.address = path
        self._ring_bytes = ring_bytes
        self._rings = rings or ring.HostRings()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._inboxes: dict[int, _Inbox] = {}
        self._outboxes = Outboxes(
            lambda path: _Outbox(path, self._rings, self._ring_bytes, self._epoll)
        )

    def connect(self, peers: Mapping[int, str]) -> None:
        self._outboxes.connect(peers)

    def send(self, peer: int, header: bytes, tensors: Sequence[torch.Tensor] = ()) -> None:
        self._outboxes[peer].send(header, list(tensors))

    def room(self, peer: int) -> int:
        return self._outboxes[peer].room

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        # One event at a time: what is not taken stays in the kernel, visible to `poll_handles`.
        while events := self._epoll.poll(timeout_s, 1):
            number, happened = events[0]
            if number == self._listener.fileno():
                self._accept()
            elif (inbox := self._inboxes.get(number)) is not None:
                if (packet := inbox.receive()) is not None:
                    return packet
                if inbox.ended:
                    self._epoll.unregister(number)
                    self._inboxes.pop(number).close()
            else:
                self._outbox(number).flush(gone=bool(happened & _GONE))
        return None

    def poll_handles(self) -> list[Any]:
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
        self._inboxes[connection.fileno()] = _Inbox(connection, self._rings)
        self._epoll.register(connection, select.EPOLLIN)

    def _outbox(self, number: int) -> _Outbox:
        return next(o for o in self._outboxes if o.fileno() == number)


class _Inbox:
    """Receiver's end of a connection; its first message brings the ring."""

    def __init__(self, connection: socket.socket, rings: ring.Rings) -> None:
        self._socket = connection
        self._rings = rings
        self._reader: ring.Reader | None = None
        self.ended = False

    def receive(self) -> Packet | None:
        """Read what is there: a packet, or None for the ring or the sender's end."""
        data, files, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES, _MAX_FILES)
        try:
            if not data:
                self.ended = True
                return None
            if self._reader is None:
                if data != self._rings.kind:
                    raise InternalError(f"a {data!r} ring, where {self._rings.kind!r} is meant")
                mine, files = files, []
                self._reader = self._rings.reader(mine)
                return None
            note = _decoder.decode(data)
            if note.own_file:
                memory = self._reader.bring(ring.map_shared(files[0], note.end))
                return Packet(note.header, ring.unpack(memory, note.specs))
            return Packet(note.header, self._reader.read(note.start, note.end, note.specs))
        finally:
            _close(files)

    def close(self) -> None:
        self._socket.close()
        if self._reader is not None:
            self._reader.close()


class _Outbox:
    """Sender's end of a connection. Messages that the socket does not take wait here."""

    def __init__(self, path: str, rings: ring.Rings, ring_bytes: int, epoll: select.epoll) -> None:
        self._path = path
        self._epoll = epoll
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self._ring = rings.writer(ring_bytes)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_CONNECT_TIMEOUT_S)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            _close(self._ring.fds)
            self._ring.close()
            raise PeerLost(f"no instance answers at {path}: {error}") from error
        self._socket.setblocking(False)
        self._send(rings.kind, self._ring.fds)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def room(self) -> int:
        return 0 if self._waiting else self._ring.room

    def send(self, header: bytes, tensors: list[torch.Tensor]) -> None:
        specs = tuple(TensorSpec.of(t) for t in tensors)
        place = self._ring.write(tensors) if tensors else (0, 0)
        if place is not None:
            self._send(_encoder.encode(_Note(header, specs, *place, False)), [])
            return
        nbytes = ring.packed_bytes(tensors)
        file = os.memfd_create("kunserve-packet", os.MFD_CLOEXEC)
        os.ftruncate(file, nbytes)
        ring.pack(ring.map_shared(file, nbytes), tensors)
        self._send(_encoder.encode(_Note(header, specs, 0, nbytes, True)), [file])

    def flush(self, *, gone: bool = False) -> None:
        """Send what waits, as far as the socket takes it; with `gone`, forget it."""
        while self._waiting and (gone or self._try_send(*self._waiting[0])):
            _close(self._waiting.popleft()[1])
        if not self._waiting:
            self._epoll.unregister(self._socket)

    def close(self) -> None:
        if self._waiting:
            self.flush(gone=True)
        self._socket.close()
        self._ring.close()

    def _send(self, message: bytes, files: list[int]) -> None:
        """Takes over `files`."""
        if not self._waiting:
            if self._try_send(message, files):
                _close(files)
                return
            self._epoll.register(self._socket, select.EPOLLOUT)
        self._waiting.append((message, files))

    def _try_send(self, message: bytes, files: list[int]) -> bool:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
        try:
            self._socket.sendmsg([message], [rights] if files else [])
        except BlockingIOError:
            return False
        except OSError as error:
            raise PeerLost(f"the instance at {self._path} has gone: {error}") from error
        return True


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)

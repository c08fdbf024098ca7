"""The ends of a connection between two instances of one host: a socket beside a ring."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
from collections import deque

import msgspec
import torch

from kunserve_sglang.core.errors import InternalError, PeerLost
from kunserve_sglang.transport import ring
from kunserve_sglang.transport.data import Malformed, Packet, TensorSpec, decoded

_TAIL = struct.Struct("<Q")
_MESSAGE_BYTES = 128 << 10
_MAX_FILES = 253
_CONNECT_TIMEOUT_S = 5.0


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


class RingInbox:
    """Receiver's end of a connection; its first message brings the ring."""

    def __init__(self, connection: socket.socket, rings: ring.Rings, shares_tail: bool) -> None:
        self._socket = connection
        self._shares_tail = shares_tail
        self._told = 0
        self._rings = rings
        self._reader: ring.Reader | None = None
        self.ended = False

    def receive(self) -> Packet | None:
        """Read what is there: a packet, or None for the ring or the sender's end.

        Raises `Malformed`.
        """
        data, files, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES, _MAX_FILES)
        try:
            if not data:
                self.ended = True
                return None
            if self._reader is None:
                self.ended = True  # unless there is a ring; its sender finds out when it sends more
                if data != self._rings.kind:
                    if data in ring.KINDS:
                        raise InternalError(f"a {data!r} ring, where {self._rings.kind!r} is meant")
                    raise Malformed("no ring")
                mine, files = files, []
                self._reader = self._rings.reader(mine, shares_tail=self._shares_tail)
                self.ended = False
                return None
            note = decoded(_decoder, data)
            if note.end - note.start != ring.packed_bytes(spec.nbytes for spec in note.specs):
                raise Malformed(f"tensors of other sizes at {note.start} to {note.end}")
            if note.own_file:
                if note.start or not files or os.fstat(files[0]).st_size < note.end:
                    raise Malformed("tensors in a file that is not there")
                memory = self._reader.bring(ring.map_shared(files[0], note.end))
                return Packet(note.header, ring.unpack(memory, note.specs))
            return Packet(note.header, self._reader.read(note.start, note.end, note.specs))
        finally:
            close_files(files)

    def tell_tail(self) -> None:
        """Tell the sender what has been let go of since; if it takes nothing now, the next time."""
        if self._reader is not None and self._reader.released > self._told:
            with contextlib.suppress(OSError):  # of a sender that is gone, or has not looked yet
                self._socket.send(_TAIL.pack(self._reader.released), socket.MSG_DONTWAIT)
                self._told = self._reader.released

    def close(self) -> None:
        self._socket.close()
        if self._reader is not None:
            self._reader.close()


class RingOutbox:
    """Sender's end of a connection. Messages that the socket does not take wait here."""

    lost = ""  # its peer ends with its path, and the next one has another

    def __init__(
        self,
        path: str,
        rings: ring.Rings,
        ring_bytes: int,
        epoll: select.epoll,
        shares_tail: bool,
    ) -> None:
        self._path = path
        self._shares_tail = shares_tail
        self._epoll = epoll
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self._ring = rings.writer(ring_bytes)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_CONNECT_TIMEOUT_S)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            close_files(self._ring.fds)
            self._ring.close()
            raise PeerLost(f"no instance answers at {path}: {error}") from error
        self._socket.setblocking(False)
        self._send(rings.kind, self._ring.fds)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def window(self) -> int:
        return self._ring.nbytes

    @property
    def room(self) -> int:
        self._hear_tail()
        return 0 if self._waiting else self._ring.room

    def send(self, header: bytes, tensors: list[torch.Tensor]) -> None:
        specs = tuple(TensorSpec.of(t) for t in tensors)
        self._hear_tail()
        place = self._ring.write(tensors) if tensors else (0, 0)
        if place is not None:
            self._send(_encoder.encode(_Note(header, specs, *place, False)), [])
            return
        nbytes = ring.packed_bytes(t.nbytes for t in tensors)
        file = os.memfd_create("kunserve-packet", os.MFD_CLOEXEC)
        os.ftruncate(file, nbytes)
        ring.pack(ring.map_shared(file, nbytes), tensors)
        self._send(_encoder.encode(_Note(header, specs, 0, nbytes, True)), [file])

    def flush(self, *, gone: bool = False) -> None:
        """Send what waits, as far as the socket takes it; with `gone`, forget it."""
        while self._waiting and (gone or self._try_send(*self._waiting[0])):
            close_files(self._waiting.popleft()[1])
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
                close_files(files)
                return
            self._epoll.register(self._socket, select.EPOLLOUT)
        self._waiting.append((message, files))

    def _hear_tail(self) -> None:
        """Take in what the receiver has told of it, if that is how it does."""
        if self._shares_tail:
            return
        with contextlib.suppress(OSError):  # there is nothing more, or the receiver is gone
            while len(told := self._socket.recv(_TAIL.size, socket.MSG_DONTWAIT)) == _TAIL.size:
                self._ring.free(*_TAIL.unpack(told))

    def _try_send(self, message: bytes, files: list[int]) -> bool:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
        try:
            self._socket.sendmsg([message], [rights] if files else [])
        except BlockingIOError:
            return False
        except OSError as error:
            raise PeerLost(f"the instance at {self._path} has gone: {error}") from error
        return True


def close_files(files: list[int]) -> None:
    for file in files:
        os.close(file)

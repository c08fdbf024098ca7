"""Data plane between hosts: ZMQ over TCP, one copy in and one copy out.

Encrypted, and for members of the cluster only. Each peer is sent to by two connections, so that
activations never queue behind bulk. Of bulk so much is on its way as the receiver has said that it
has let go of (credit): what a peer does not take stays with whoever wants to send it.
"""

from __future__ import annotations

import struct
import time
import weakref
from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Sized
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch
import zmq

from kunserve_sglang.core.dropped import Dropped
from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.keys import MemberKeys
from kunserve_sglang.core.sockets import PollHandle
from kunserve_sglang.transport.connection import DataConnection
from kunserve_sglang.transport.data import Malformed, Packet, Tensors, TensorSpec, decoded
from kunserve_sglang.transport.outboxes import Outboxes
from kunserve_sglang.transport.ring import aligned, packed_bytes, unpack
from kunserve_sglang.transport.sockets import PacketSockets
from kunserve_sglang.transport.windows import ON_HOST

_CREDIT = struct.Struct("<Q")
"""Bytes of bulk that the receiver has let go of since it last said so."""

_ACTIVATIONS, _BULK = b"a", b"b"
_MAX_FRAME_BYTES = 1 << 30
_CONNECT_TIMEOUT_S = 5.0

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[TensorSpec, ...])


class TcpDataPlane:
    """One socket for everything that arrives, two connections to each peer."""

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        keys: MemberKeys,
        device: torch.device,
        window: int = ON_HOST.bulk,
    ) -> None:
        """`address` is `tcp://host:*` or with a port; the bound one is in `self.address`.

        `context` must have no other plane: it takes one checker of keys. Tensors are received on
        `device`. At most `window` bytes of bulk wait for a peer, or one packet; it may change.
        """
        self.bulk_window = window
        self._device = device
        self._sockets = PacketSockets(context, keys)
        self._inbox = self._sockets.inbox(address, zmq.ROUTER, max_bytes=_MAX_FRAME_BYTES)
        self.address = self._inbox.getsockopt_string(zmq.LAST_ENDPOINT)
        self._outboxes = Outboxes(partial(_TcpOutbox, self._sockets, self))
        self._owed: Counter[bytes] = Counter()
        self._dropped = Dropped()

    @property
    def malformed(self) -> int:
        return self._dropped.count

    def connect(self, peers: Mapping[int, str]) -> None:
        self._outboxes.connect(peers)

    def send(self, peer: int, header: bytes, tensors: Tensors = (), *, bulk: bool = False) -> None:
        specs = tuple(TensorSpec.of(t) for t in tensors)
        frames: list[bytes] = [header, _encoder.encode(specs)]
        frames += [
            t.flatten().contiguous().view(torch.uint8).cpu().numpy().tobytes() for t in tensors
        ]
        self._outboxes[peer].send(frames, bulk=bulk)

    def room(self, peer: int) -> int:
        return self._outboxes[peer].room

    def window(self, peer: int) -> int:  # noqa: ARG002 (all have the same)
        return self.bulk_window

    def lost(self, peers: Collection[int]) -> str:
        return next((why for p in peers if (why := self._outboxes[p].lost)), "")

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        self._give_credit()
        deadline = time.monotonic() + timeout_s
        while self._inbox.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            sender, *frames = self._inbox.recv_multipart(copy=False)
            try:
                return self._packet(sender.bytes, frames)
            except Malformed as error:
                self._dropped.because(error)
        return None

    def poll_handles(self) -> list[PollHandle]:
        return [self._inbox]

    def close(self) -> None:
        self.connect({})
        self._inbox.close()
        self._sockets.close()

    def _packet(self, sender: bytes, frames: list[zmq.Frame]) -> Packet:
        """Copies the tensors: the receiver may compute in place. Raises `Malformed`."""
        if len(frames) < 3:
            raise Malformed(f"a packet of {len(frames)} parts")
        kind, header, described, *contents = frames
        specs = decoded(_decoder, described.buffer)
        sizes = [spec.nbytes for spec in specs]
        if sizes != [len(content) for content in contents]:
            raise Malformed(f"tensors of {sizes} bytes in other sizes")
        if kind.bytes == _BULK:
            tensors = self._counted(sender, specs, contents, _size(frames[1:]))
        else:
            tensors = [_tensor(*both) for both in zip(specs, contents, strict=True)]
        return Packet(header.bytes, [tensor.to(self._device) for tensor in tensors])

    def _counted(
        self,
        sender: bytes,
        specs: tuple[TensorSpec, ...],
        contents: list[zmq.Frame],
        nbytes: int,
    ) -> list[torch.Tensor]:
        """Tensors of bulk; `sender` gets credit for `nbytes` bytes when they have died."""
        memory = np.empty(packed_bytes(len(content) for content in contents), dtype=np.uint8)
        # The tensors keep this array alive, and nothing else does.
        weakref.finalize(memory, self._owed.update, {sender: nbytes}).atexit = False
        at = 0
        for content in contents:
            memory[at : at + len(content)] = np.frombuffer(content.buffer, dtype=np.uint8)
            at += aligned(len(content))
        return unpack(torch.from_numpy(memory), specs)

    def _give_credit(self) -> None:
        """Let senders of bulk go on, as far as their packets have been taken and are gone."""
        while self._owed:
            sender, nbytes = self._owed.popitem()
            self._inbox.send_multipart([sender, _CREDIT.pack(nbytes)])


class _TcpOutbox:
    """Sender's end of both connections to one peer."""

    def __init__(self, sockets: PacketSockets, plane: TcpDataPlane, address: str) -> None:
        """Raises `PeerLost` if no member takes packets there."""
        self._plane = plane
        self._under_way = 0
        self._activations = DataConnection(sockets.outbox(zmq.DEALER), address)
        self._bulk = DataConnection(sockets.outbox(zmq.DEALER), address)
        try:
            for connection in (self._activations, self._bulk):
                connection.wait(_CONNECT_TIMEOUT_S)
        except PeerLost:
            self.close()
            raise

    @property
    def lost(self) -> str:
        """Why nothing more arrives at the peer; empty if something may."""
        return self._activations.ended or self._bulk.ended

    @property
    def room(self) -> int:
        while (credit := self._bulk.receive()) is not None:
            if len(credit) == _CREDIT.size:
                self._under_way -= _CREDIT.unpack(credit)[0]
        return max(0, self._plane.bulk_window - self._under_way)

    def send(self, frames: list[bytes], *, bulk: bool) -> None:
        connection = self._bulk if bulk else self._activations
        if connection.ended:
            raise PeerLost(connection.ended)
        if bulk:
            self._under_way += _size(frames)
        connection.send([_BULK if bulk else _ACTIVATIONS, *frames])

    def close(self) -> None:
        self._activations.close()
        self._bulk.close()


def _size(frames: Sequence[Sized]) -> int:
    return sum(len(frame) for frame in frames)


def _tensor(spec: TensorSpec, content: zmq.Frame) -> torch.Tensor:
    memory = bytearray(content.buffer)
    if not memory:
        return torch.empty(spec.shape, dtype=spec.torch_dtype)
    return torch.frombuffer(memory, dtype=spec.torch_dtype).view(spec.shape)

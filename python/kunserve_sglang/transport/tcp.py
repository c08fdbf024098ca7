"""Data plane between hosts: ZMQ over TCP, one copy in and one copy out.

Encrypted, and for members of the cluster only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
import zmq

from kunserve_sglang.core.keys import MemberKeys
from kunserve_sglang.transport.data import Packet, TensorSpec
from kunserve_sglang.transport.outboxes import Outboxes
from kunserve_sglang.transport.sockets import PacketSockets

_PIECE_BYTES = 64 << 20

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[TensorSpec, ...])


class TcpDataPlane:
    """One PULL socket for everything that arrives, one PUSH socket a peer."""

    def __init__(
        self, context: zmq.Context[Any], address: str, keys: MemberKeys, device: torch.device
    ) -> None:
        """`address` is `tcp://host:*` or with a port; the bound one is in `self.address`.

        `context` must have no other plane: it takes one checker of keys. Tensors are received on
        `device`.
        """
        self._device = device
        self._sockets = PacketSockets(context, keys)
        self._inbox = self._sockets.inbox(address)
        self.address = self._inbox.getsockopt_string(zmq.LAST_ENDPOINT)
        self._outboxes = Outboxes(self._sockets.outbox)

    def connect(self, peers: Mapping[int, str]) -> None:
        self._outboxes.connect(peers)

    def send(self, peer: int, header: bytes, tensors: Sequence[torch.Tensor] = ()) -> None:
        outbox = self._outboxes[peer]
        specs = tuple(TensorSpec.of(t) for t in tensors)
        frames: list[Any] = [header, _encoder.encode(specs)]
        frames += [
            t.flatten().contiguous().view(torch.uint8).cpu().numpy().tobytes() for t in tensors
        ]
        outbox.send_multipart(frames, copy=False)

    def room(self, peer: int) -> int:  # noqa: ARG002
        return _PIECE_BYTES  # ZMQ queues, and says nothing of what the network has taken

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        if not self._inbox.poll(int(timeout_s * 1000)):
            return None
        header, specs, *frames = self._inbox.recv_multipart(copy=False)
        tensors = [
            _tensor(spec, frame).to(self._device)
            for spec, frame in zip(_decoder.decode(specs.buffer), frames, strict=True)
        ]
        return Packet(header.bytes, tensors)

    def poll_handles(self) -> list[Any]:
        return [self._inbox]

    def close(self) -> None:
        self.connect({})
        self._inbox.close()
        self._sockets.close()


def _tensor(spec: TensorSpec, frame: zmq.Frame) -> torch.Tensor:
    memory = bytearray(frame.buffer)  # a copy: the receiver may compute in place
    if not memory:
        return torch.empty(spec.shape, dtype=spec.torch_dtype)
    return torch.frombuffer(memory, dtype=spec.torch_dtype).view(spec.shape)

"""The interface between instances of a group: ordered packets of a header and tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec
import torch

from kunserve_sglang.core.decoding import decode
from kunserve_sglang.core.errors import TransientError
from kunserve_sglang.core.sockets import PollHandle

Tensors = Sequence[torch.Tensor]
"""What is sent beside a header."""


@dataclass(frozen=True, slots=True)
class Packet:
    """A header (opaque to the transport) and tensors that belong to the receiver."""

    header: bytes
    tensors: list[torch.Tensor]


class Malformed(TransientError):
    """A packet that no member sends like this; it is dropped."""


DecodedT = TypeVar("DecodedT")


def decoded(decoder: msgspec.msgpack.Decoder[DecodedT], data: bytes | memoryview) -> DecodedT:
    """Raises `Malformed` for whatever cannot be read."""
    try:
        return decode(decoder, data)
    except msgspec.DecodeError as error:
        raise Malformed(str(error)) from error


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """What a receiver must know to read a tensor out of bytes."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises `Malformed` for a name that no tensor has."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise Malformed(f"a tensor of {self.dtype[:40]!r}")
        return dtype

    @property
    def nbytes(self) -> int:
        """Raises `Malformed`."""
        if any(length < 0 for length in self.shape):
            raise Malformed(f"a tensor of {self.shape}")
        return self.torch_dtype.itemsize * math.prod(self.shape)


class DataPlane(Protocol):
    """Packets from one sender arrive in the order sent, those of bulk among themselves.

    Activations overtake bulk (KV rows, parameters). Nothing is promised across senders.
    """

    address: str

    @property
    def malformed(self) -> int:
        """Packets that were dropped because no member sends them like that."""
        ...

    def connect(self, peers: Mapping[int, str]) -> None:
        """Be able to send to `peers` (instance -> address); connections to others are closed.

        Raises `PeerLost` if one cannot be reached.
        """
        ...

    def send(self, peer: int, header: bytes, tensors: Tensors = (), *, bulk: bool = False) -> None:
        """Never blocks. The tensors are copied: they may change, or be unmapped, afterwards.

        Raises `PeerLost` if the peer is known to have gone.
        """
        ...

    def room(self, peer: int) -> int:
        """Bytes of bulk that can be sent at once with no memory but what is there for it.

        More can be sent, at the price of memory: whoever has bulk keeps it until there is room.
        """
        ...

    def window(self, peer: int) -> int:
        """The room that there is when the peer has taken all bulk."""
        ...

    def lost(self, peers: Collection[int]) -> str:
        """Why nothing more arrives at one of these peers; empty as long as that is not known."""
        ...

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        """The next packet, or None if none came in time."""
        ...

    def poll_handles(self) -> list[PollHandle]:
        """What a `zmq.Poller` can wait on for arriving packets: any of these."""
        ...

    def close(self) -> None: ...

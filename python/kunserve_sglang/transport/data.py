"""The interface between instances of a group: ordered packets of a header and tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import torch


@dataclass(frozen=True, slots=True)
class Packet:
    """A header (opaque to the transport) and tensors that belong to the receiver."""

    header: bytes
    tensors: list[torch.Tensor]


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """What a receiver must know to read a tensor out of bytes."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class DataPlane(Protocol):
    """Packets from one sender arrive in the order sent; nothing is promised across senders."""

    address: str

    def connect(self, peers: Mapping[int, str]) -> None:
        """Be able to send to `peers` (instance -> address); connections to others are closed.

        Raises `PeerLost` if one cannot be reached.
        """
        ...

    def send(self, peer: int, header: bytes, tensors: Sequence[torch.Tensor] = ()) -> None:
        """Never blocks. The tensors are copied: they may change, or be unmapped, afterwards.

        Raises `PeerLost` if the peer is known to have gone.
        """
        ...

    def room(self, peer: int) -> int:
        """Bytes that can be sent at once with no memory but what is there for it.

        More can be sent, at the price of memory: whoever moves much waits for room instead.
        """
        ...

    def receive(self, timeout_s: float = 0.0) -> Packet | None:
        """The next packet, or None if none came in time."""
        ...

    def poll_handles(self) -> list[Any]:
        """What a `zmq.Poller` can wait on for arriving packets: any of these."""
        ...

    def close(self) -> None: ...

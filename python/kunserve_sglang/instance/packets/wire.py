"""Headers of the packets that members of a group send one another."""

from __future__ import annotations

import msgspec
import torch

from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.instance.packets.packing import Packed
from kunserve_sglang.instance.parts.engine import Hidden
from kunserve_sglang.transport.data import decoded


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """Common part: a packet of another epoch is dropped and counted."""

    sender: int
    epoch: int


class MicroBatch(Envelope, frozen=True, kw_only=True, tag="micro_batch"):
    """A micro-batch of `owner` on its way to stage `position`; back at its owner after the last.

    `launched` is when it left its owner, in monotonic seconds of that host;
    `cost_ms` its predicted time through all stages, `round_ms` that of all its owner's work.

    `packed` is what a stage must know of its requests; its owner knows, so there it is None.

    `failed` says what went wrong in a stage that has run it; the others pass it on as it is.

    Tensors: [what is packed, unless it is inline], hidden, [residual if has_residual].
    """

    owner: int
    sequence: int
    position: int
    packed: Packed | None
    has_residual: bool
    launched: float
    cost_ms: float
    round_ms: float
    failed: str = ""


class TakenSlots(Envelope, frozen=True, kw_only=True, tag="taken_slots"):
    """First packet of a transition: the sender's slots before and after. Tensors: both, int64."""


class KvRows(Envelope, frozen=True, kw_only=True, tag="kv_rows"):
    """KV of some slots of `owner` in `layers`; `last` if nothing of it is left to send.

    `number` is how many pieces of the same were sent before, so that one that is missing shows.

    Tensors: [slots, int64, unless they are inline], K and V rows, each
    `(len(layers), len(slots), heads, dim)`.
    """

    owner: int
    layers: LayerRange
    slots: bytes
    number: int
    last: bool = False


class LayerParameters(Envelope, frozen=True, kw_only=True, tag="layer_parameters"):
    """Bytes of the parameters of `layer`, from `offset` on. Tensors: flat uint8."""

    layer: int
    offset: int


Header = MicroBatch | TakenSlots | KvRows | LayerParameters

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Header] = msgspec.msgpack.Decoder(Header)
_envelopes = msgspec.msgpack.Decoder(Envelope)


def encode(header: Header) -> bytes:
    return _encoder.encode(header)


def decode(data: bytes) -> Header:
    """Raises `Malformed`."""
    return decoded(_decoder, data)


def envelope(data: bytes) -> Envelope:
    """The common part alone. Raises `Malformed`."""
    return decoded(_envelopes, data)


def tensors_of(described: list[torch.Tensor], hidden: Hidden) -> list[torch.Tensor]:
    """The tensors of a `MicroBatch`; `described` is what `packing.pack` leaves to them."""
    return [*described, *(t for t in hidden if t is not None)]


def hidden_of(header: MicroBatch, tensors: list[torch.Tensor]) -> Hidden:
    """Hidden states and residual stream, where they have arrived."""
    if header.has_residual:
        return tensors[-2], tensors[-1]
    return tensors[-1], None


def described_by(header: MicroBatch, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The inverse of `tensors_of`, but for the hidden states. On the host."""
    return [t.cpu() for t in tensors[: -2 if header.has_residual else -1]]

"""Headers of the packets that members of a group send one another."""

from __future__ import annotations

import msgspec


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """Common part: a packet of another epoch is dropped and counted."""

    sender: int
    epoch: int


class MicroBatch(Envelope, frozen=True, kw_only=True, tag="micro_batch"):
    """A micro-batch of `owner` on its way to stage `position`; back at its owner after the last.

    Tensors: seq_lens, positions, out_slots, rows, table starts, table lengths, table slots,
    [prefix_lens, extend_lens unless decode], hidden, [residual if has_residual].
    """

    owner: int
    sequence: int
    position: int
    decode: bool
    has_residual: bool


class TakenSlots(Envelope, frozen=True, kw_only=True, tag="taken_slots"):
    """First packet of a transition: the sender's slots before and after. Tensors: both, int64."""


class KvRows(Envelope, frozen=True, kw_only=True, tag="kv_rows"):
    """KV of all taken slots of `owner` in `layer`. Tensors: K rows, V rows."""

    owner: int
    layer: int


class LayerParameters(Envelope, frozen=True, kw_only=True, tag="layer_parameters"):
    """All parameters of `layer`. Tensors: flat uint8."""

    layer: int


Header = MicroBatch | TakenSlots | KvRows | LayerParameters

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Header] = msgspec.msgpack.Decoder(Header)


def encode(header: Header) -> bytes:
    return _encoder.encode(header)


def decode(data: bytes) -> Header:
    """Raises `msgspec.DecodeError`."""
    return _decoder.decode(data)

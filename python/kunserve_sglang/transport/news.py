"""What the ends of a lane tell each other beside it."""

from __future__ import annotations

import msgspec

from kunserve_sglang.transport.data import TensorSpec, decoded


class LaneAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where an instance hears of packets, and where it meets those who send them."""

    news: str
    store: str


class Open(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A sender waits to make this lane."""

    lane: str


class Sent(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A packet; its tensors, if any, are about to pass the lane."""

    lane: str
    header: bytes
    specs: tuple[TensorSpec, ...]
    nbytes: int


class Closed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    lane: str


News = Open | Sent | Closed

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[News] = msgspec.msgpack.Decoder(News)


def news_of(message: News) -> bytes:
    return _encoder.encode(message)


def heard(data: bytes) -> News:
    """Raises `Malformed`."""
    return decoded(_decoder, data)

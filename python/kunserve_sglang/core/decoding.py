"""Messages of others, in which anything may stand."""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")


def decode(decoder: msgspec.msgpack.Decoder[T], data: bytes | memoryview) -> T:
    """Raises `msgspec.DecodeError` for whatever cannot be read; decoders raise others too."""
    try:
        return decoder.decode(data)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error

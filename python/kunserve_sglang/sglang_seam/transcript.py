"""What has been sent of an answer, in little memory, to be sent once more."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

_LEVEL = 3
_MEMORY = 5
_WINDOW_BITS = 15
"""Events of `/generate` repeat all of the text: within the 32 KiB of this, that takes nothing."""

_BYTES_PER_PART = 64
_BYTES_AT_WORK = 160 << 10
"""What a transcript takes that is not at its end, by the formula of zlib's manual."""

_PIECE = 64 << 10


class Transcript:
    """Bytes as they come. `size` is what it takes in memory."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: list[bytes] = []
        self._packer: zlib._Compress | None = None

    def add(self, data: bytes) -> None:
        if self._packer is None:
            self._packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS, _MEMORY)
            self.size += _BYTES_AT_WORK
        self._keep(self._packer.compress(data))

    def end(self) -> None:
        """Nothing is to be added any more."""
        if self._packer is not None:
            self._keep(self._packer.flush())
            self._packer = None
            self.size -= _BYTES_AT_WORK

    def so_far(self) -> Iterator[bytes]:
        """All that has been added until now, in pieces of moderate size."""
        if self._packer is not None:
            self._keep(self._packer.flush(zlib.Z_SYNC_FLUSH))
        return _unpacked(tuple(self._parts))

    def clear(self) -> None:
        self.size, self._packer = 0, None
        self._parts.clear()

    def _keep(self, part: bytes) -> None:
        if part:
            self._parts.append(part)
            self.size += len(part) + _BYTES_PER_PART


def _unpacked(parts: Sequence[bytes]) -> Iterator[bytes]:
    packed = zlib.decompressobj()
    for part in parts:
        piece = packed.decompress(part, _PIECE)
        while piece or packed.unconsumed_tail:
            yield piece
            piece = packed.decompress(packed.unconsumed_tail, _PIECE)

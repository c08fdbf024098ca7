"""Token sequences as chained hashes of their blocks: what both planes call a prefix. Pure.

A block's hash says which tokens it holds and which come before it, so two sequences share a prefix
exactly as far as their hashes are equal. What is left behind the last whole block has no hash.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import NamedTuple

BLOCK_TOKENS = 32
"""Tokens of a block: how finely prefixes are compared. Smaller blocks mean more hashes."""

_HASH_BYTES = 8
_BLOCK_BYTES = BLOCK_TOKENS * array("q").itemsize


class Chain(NamedTuple):
    """Where a sequence ends: the hash of its last whole block, and the tokens behind it."""

    last: bytes
    tail: bytes = b""


def start(namespace: str | None = None) -> Chain:
    """An empty sequence. Equal tokens in different namespaces (SGLang's `extra_key`) differ."""
    return Chain(_hash((namespace or "").encode()))


def extend(chain: Chain, tokens: array[int]) -> tuple[list[int], Chain]:
    """The hashes of the blocks that `tokens` complete, and where the sequence then ends.

    `tokens` has typecode `q`, as in SGLang.
    """
    last, data = chain.last, chain.tail + tokens.tobytes()
    whole = len(data) - len(data) % _BLOCK_BYTES
    hashes = []
    for at in range(0, whole, _BLOCK_BYTES):
        last = _hash(last + data[at : at + _BLOCK_BYTES])
        hashes.append(int.from_bytes(last, "little"))
    return hashes, Chain(last, data[whole:])


def block_hashes(tokens: array[int], namespace: str | None = None) -> list[int]:
    """One 64-bit hash for each whole block of a sequence."""
    return extend(start(namespace), tokens)[0]


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=_HASH_BYTES).digest()

"""In place of the kernel for GPUs by which SGLang hashes seeds: the same numbers, by torch."""

from __future__ import annotations

import torch

_ALL = 0xFFFFFFFF
_BLOCKS_BYTES = 16


def murmur_hash32(
    seeds: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3 of seed (64 bits), position and column (32 each); (n,), (n,), (m,) to (n, m).

    In 64 bits: what a product has above them is cut off in the end.
    """
    seeds = seeds.to(torch.int64).view(-1, 1)
    places = positions.to(torch.int64).view(-1, 1)
    hashed = torch.zeros(len(seeds), len(columns), dtype=torch.int64)
    for block in (seeds & _ALL, (seeds >> 32) & _ALL, places & _ALL, columns.to(torch.int64)):
        hashed = _mixed(hashed, block)
    return _final(hashed ^ _BLOCKS_BYTES)


def _mixed(hashed: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = _rotated((block * 0xCC9E2D51) & _ALL, 15)
    hashed = _rotated(hashed ^ ((block * 0x1B873593) & _ALL), 13)
    return (hashed * 5 + 0xE6546B64) & _ALL


def _final(hashed: torch.Tensor) -> torch.Tensor:
    hashed = ((hashed ^ (hashed >> 16)) * 0x85EBCA6B) & _ALL
    hashed = ((hashed ^ (hashed >> 13)) * 0xC2B2AE35) & _ALL
    return hashed ^ (hashed >> 16)


def _rotated(value: torch.Tensor, by: int) -> torch.Tensor:
    return ((value << by) | (value >> (32 - by))) & _ALL

"""Packets that no member sends: real ones, spoilt. The same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch

from kunserve_sglang.transport import Packet

_MAX_EXTRA_BYTES = 4096
_ODD_NUMBERS = (-1, 0, 1, 7, 255, 1 << 31, -(1 << 31), (1 << 63) - 1, -(1 << 63), 1e308, -1.0)
_ODD_VALUES: tuple[Any, ...] = (
    *_ODD_NUMBERS,
    float("nan"),
    float("inf"),
    None,
    True,
    "",
    "x" * 300,
    b"\0",
    [],
    {},
)
_TYPES = (torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.uint8, torch.bool)


def hostile_frames(seed: int, frames: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Without end: these parts of a message, of which some are wrong, missing, or too many."""
    rng = random.Random(seed)
    while True:
        spoilt = list(frames)
        for _ in range(rng.randint(1, 3)):
            if not spoilt or rng.random() < 0.1:
                spoilt.append(rng.randbytes(rng.randint(0, 64)))
                continue
            at = rng.randrange(len(spoilt))
            kind = rng.randrange(4)
            if kind == 0:
                del spoilt[at]
            elif kind == 1:
                spoilt.insert(at, spoilt[at])
            else:
                spoilt[at] = _spoilt_bytes(rng, spoilt[at])
        yield spoilt


def hostile_packets(seed: int, valid: Sequence[Packet]) -> Iterator[Packet]:
    """Without end: packets like these, wrong in header or tensors, or sent again."""
    rng = random.Random(seed)
    while True:
        packet = rng.choice(valid)
        header, tensors = packet.header, [t.clone() for t in packet.tensors]
        kind = rng.randrange(8)
        if kind < 4:
            header = _spoilt_header(rng, header)
        elif kind < 7:
            tensors = _spoilt_tensors(rng, tensors)
        yield Packet(header, tensors)


def _spoilt_header(rng: random.Random, header: bytes) -> bytes:
    """Bytes of no meaning, or a message in which one field says something else."""
    if rng.random() < 0.3:
        return _spoilt_bytes(rng, header)
    fields = msgspec.msgpack.decode(header)
    _spoil_fields(rng, fields)
    return msgspec.msgpack.encode(fields)


def _spoil_fields(rng: random.Random, fields: Any) -> None:
    places = list(fields) if isinstance(fields, dict) else list(range(len(fields)))
    if not places:
        return
    at = rng.choice(places)
    value = fields[at]
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        _spoil_fields(rng, value)
    elif isinstance(value, bytes) and rng.random() < 0.7:
        fields[at] = _spoilt_bytes(rng, value)
    elif isinstance(value, int) and rng.random() < 0.5:
        fields[at] = value + rng.choice((-2, -1, 1, 2))
    elif isinstance(fields, dict) and rng.random() < 0.1:
        del fields[at]
    else:
        fields[at] = rng.choice(_ODD_VALUES)


def _spoilt_bytes(rng: random.Random, data: bytes) -> bytes:
    kind = rng.randrange(5)
    if kind == 0 or not data:
        return rng.randbytes(rng.randint(0, 200))
    at = rng.randrange(len(data))
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data + rng.randbytes(rng.randint(1, _MAX_EXTRA_BYTES))
    flipped = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _spoilt_tensors(rng: random.Random, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    if not tensors or rng.random() < 0.1:
        return [*tensors, torch.zeros(rng.randint(0, 5))]
    at = rng.randrange(len(tensors))
    tensor, kind = tensors[at], rng.randrange(6)
    if kind == 0:
        del tensors[at]
    elif kind == 1:
        tensors.insert(at, tensor)
    elif kind == 2:
        tensors[at] = tensor.to(rng.choice(_TYPES))
    elif kind == 3:
        tensors[at] = tensor.flatten()[: rng.randint(0, tensor.numel())]
    elif kind == 4:
        tensors[at] = torch.cat([tensor, tensor]) if tensor.dim() else tensor.view(1, 1, 1)
    elif tensor.numel() and not tensor.is_floating_point():
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((-1, 99, 250))
    return tensors

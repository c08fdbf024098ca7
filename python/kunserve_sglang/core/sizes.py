"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from kunserve_sglang.core.errors import ConfigurationError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes in `448MiB`, `1.5G`, `2000000`; raises `ConfigurationError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ConfigurationError(f"{text!r} is no size; write for example 448MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(nbytes: float) -> str:
    """`nbytes` for people: `448.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"

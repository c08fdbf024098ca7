"""Which number format a CPU is to compute in, where the user has named none. Pure.

CPUs differ by an order of magnitude in what half the bits cost them: with AMX or AVX512-BF16 a
product in bfloat16 takes half the time of one in float32, with AVX2 alone four to nine times as
much, since every number is converted first.
"""

from __future__ import annotations

from dataclasses import dataclass

from kunserve_sglang.core.sizes import format_size

FLOAT32 = "float32"

_WORTH_IT = 1.25
"""How many times slower a model's own format has to be: float32 takes twice the memory."""

_PARAMETERS_SHARE = 0.6
"""Of the budget, at most; the rest is for KV, without which there is nothing to serve with."""


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """What to compute in, and what to tell the user; empty if there is nothing to tell."""

    dtype: str
    note: str = ""


def choose_dtype(own: str, slower: float, own_bytes: int, budget: int) -> DtypeChoice:
    """`own` is the model's format, which was measured as so many times `slower` than float32.

    `own_bytes` are those of its parameters, `budget` those of one instance.
    """
    if slower < _WORTH_IT:
        return DtypeChoice(own)
    found = f"{own} takes {slower:.1f} times as long as {FLOAT32} on this CPU"
    needed = 2 * own_bytes / _PARAMETERS_SHARE
    if needed <= budget:
        return DtypeChoice(FLOAT32, f"{found}: serving in {FLOAT32} (--dtype {own}: as it is)")
    return DtypeChoice(
        own, f"{found}, which would be taken with --memory-budget {format_size(needed)} or more"
    )

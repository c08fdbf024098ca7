"""Several ranks of an instance in one process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kunserve_sglang.instance.ranks.ranks import Ranks

T = TypeVar("T")

WAIT_S = 20.0


def together(ranks: list[Ranks], program: Callable[[Ranks], T]) -> list[T]:
    """Run one program on all ranks at once; what each of them returns."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [run.result(WAIT_S) for run in [pool.submit(program, rank) for rank in ranks]]

"""What a check is, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

import torch

from kunserve_sglang.memory import PhysicalPagePool
from kunserve_sglang.memory.cuda import CudaPages
from kunserve_sglang.memory.cuda_driver import CudaDevice

Figures = dict[str, float]
"""What was measured, by name and unit."""


class NotPossible(Exception):
    """The check cannot be made on this machine, or with this version; says why."""


class Status(StrEnum):
    OK = "ok"
    FAILED = "failed"
    OVER_TIME = "over time"
    NOT_POSSIBLE = "not possible"


@dataclass(frozen=True)
class Outcome:
    """How a check ended; `reason` says why it is not `OK`."""

    name: str
    status: Status
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Bench:
    """A device to check on, and how much a gibibyte is there: checks are tried out on less."""

    open_gpu: Callable[[], CudaDevice]
    device: torch.device
    gib: int

    @classmethod
    def gpu(cls) -> Bench:
        """The first GPU of this machine."""
        return cls(partial(CudaDevice, 0), torch.device("cuda", 0), 1 << 30)

    def pool(self, nbytes: int, page_bytes: int) -> PhysicalPagePool:
        """Pages of their own on the device; closing the pool's driver frees them."""
        pages = CudaPages(self.open_gpu(), page_bytes, self.device)
        return PhysicalPagePool(pages, nbytes // page_bytes)


@dataclass(frozen=True)
class Check:
    """Raises `AssertionError` if what it looks for is not so, `NotPossible` if it cannot look."""

    name: str
    what: str
    limit_s: float
    run: Callable[[Bench], Figures]

    def outcome(self, bench: Bench) -> dict[str, Any]:
        """Run it here; status, figures and reason."""
        try:
            return {"status": Status.OK, "figures": self.run(bench)}
        except NotPossible as why:
            return {"status": Status.NOT_POSSIBLE, "reason": str(why)}
        except AssertionError as what:
            return {"status": Status.FAILED, "reason": str(what) or "an assertion failed"}

"""What a check is, what it finds, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

import torch

from benchmark import checks
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


class Findings:
    """What a check has measured so far, and the limits that some of it was held to.

    A limit is `what`, `value`, `bar` and `ok`, as in the other benchmarks.
    """

    def __init__(self, keep: Callable[[Findings], None] | None = None) -> None:
        """`keep` is told after each finding, so that none is lost with those that follow."""
        self.figures: Figures = {}
        self.limits: list[dict[str, Any]] = []
        self._keep = keep

    def note(self, figures: Mapping[str, float]) -> None:
        """Figures that are to be read."""
        self.figures.update(figures)
        self._kept()

    def at_most(self, what: str, value: float, most: float) -> None:
        self.limits.append(checks.check(what, value, most=most))
        self._kept()

    def at_least(self, what: str, value: float, least: float) -> None:
        self.limits.append(checks.check(what, value, least=least))
        self._kept()

    @property
    def missed(self) -> str:
        """The limits that do not hold, in words; empty if all do."""
        return "; ".join(f"{m['what']}: {m['value']:g}" for m in checks.failed(self.limits))

    def _kept(self) -> None:
        if self._keep is not None:
            self._keep(self)


@dataclass(frozen=True)
class Outcome:
    """How a check ended; `reason` says why it is not `OK`."""

    name: str
    status: Status
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    limits: list[dict[str, Any]] = field(default_factory=list)
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

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until all work on the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def copy_times(self, target: torch.Tensor, source: torch.Tensor, repeats: int) -> list[float]:
        """Seconds that each of `repeats` copies takes on the device."""
        times = []
        for _ in range(repeats):
            self.wait()
            started = time.perf_counter()
            target.copy_(source)
            self.wait()
            times.append(time.perf_counter() - started)
        return times


@dataclass(frozen=True)
class Check:
    """Raises `AssertionError` if what it looks for is not so, `NotPossible` if it cannot look.

    It has `limit_s` seconds, and those that the checks before it did not need.
    """

    name: str
    what: str
    limit_s: float
    run: Callable[[Bench, Findings], None]

    def outcome(self, bench: Bench, found: Findings) -> dict[str, Any]:
        """Run it here; status and reason."""
        try:
            self.run(bench, found)
        except NotPossible as why:
            return {"status": Status.NOT_POSSIBLE, "reason": str(why)}
        except AssertionError as what:
            return {"status": Status.FAILED, "reason": str(what) or "an assertion failed"}
        missed = found.missed
        return {"status": Status.FAILED if missed else Status.OK, "reason": missed}

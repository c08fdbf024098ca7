"""What the control plane tells and asks of whatever brings requests to its instances."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from kunserve_sglang.api.service import AttainmentSummary
from kunserve_sglang.api.types import LatencySummary, Quantiles, QueueStatus
from kunserve_sglang.control.registry import Instance
from kunserve_sglang.core.messages import CacheReport
from kunserve_sglang.policy.service_level import ServiceLevel, StepTimes, Wanted


class Front(Protocol):
    """All calls come from the control plane's event loop, and none may block it."""

    def held(self) -> int:
        """Requests held back; they count as demand."""

    def short(self) -> Collection[int]:
        """Instances from which they are held back for want of memory, though nobody waits there."""

    def wanted(self) -> tuple[Wanted, ...]:
        """What requests that are under way want of their answers, wherever they are."""

    def latency_summary(self) -> LatencySummary:
        """For the cluster's status."""

    def attainment_summary(self) -> AttainmentSummary:
        """For the cluster's status."""

    def queue_status(self) -> QueueStatus:
        """For the cluster's status."""

    def decided_by(self, level: ServiceLevel, times: StepTimes | None) -> None:
        """The limits that decide now, by which answers are to be judged as well."""

    def wants_cache(self, instance: Instance) -> bool:
        """Whether `instance` has to report its whole cache."""

    def cache_reported(self, instance: Instance, report: CacheReport) -> None:
        """What has changed in the cache of `instance`."""

    def room_changed(self) -> None:
        """An instance may take more than before."""

    def move(self, instance: Instance) -> None:
        """Let others go on with the requests of `instance`, those that can."""

    def known(self, numbers: Collection[int]) -> None:
        """The instances that there are now; all others are forgotten."""


class NoFront:
    """For a control plane alone: nothing is held back, and nothing is measured."""

    def held(self) -> int:
        return 0

    def short(self) -> Collection[int]:
        return ()

    def wanted(self) -> tuple[Wanted, ...]:
        return ()

    def latency_summary(self) -> LatencySummary:
        nothing = Quantiles(p50=None, p90=None, p99=None)
        return LatencySummary(ttft_ms=nothing, tpot_ms=nothing, samples=0, window_s=0.0)

    def attainment_summary(self) -> AttainmentSummary:
        return AttainmentSummary(window_s=0.0, classes=[])

    def queue_status(self) -> QueueStatus:
        return QueueStatus(requests=0, oldest_s=0.0)

    def decided_by(self, level: ServiceLevel, times: StepTimes | None) -> None:
        """Nothing is judged."""

    def wants_cache(self, instance: Instance) -> bool:  # noqa: ARG002
        return False

    def cache_reported(self, instance: Instance, report: CacheReport) -> None:
        """No index is kept."""

    def room_changed(self) -> None:
        """Nobody waits."""

    def move(self, instance: Instance) -> None:
        """There are none."""

    def known(self, numbers: Collection[int]) -> None:
        """Nothing is kept about instances."""

"""What the proxy knows of requests and caches, as the control plane is shown it."""

from __future__ import annotations

from collections.abc import Collection

from kunserve_sglang.api.service import AttainmentSummary
from kunserve_sglang.api.types import LatencySummary, QueueStatus
from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.core.choices import DispatchPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.messages import CacheReport
from kunserve_sglang.core.service_classes import read_classes
from kunserve_sglang.core.tenants import Tenants
from kunserve_sglang.policy.service_level import ServiceLevel, StepTimes, Wanted
from kunserve_sglang.router.proxy.attainment import Attainment
from kunserve_sglang.router.proxy.latency import Latency
from kunserve_sglang.router.proxy.moves import Moves
from kunserve_sglang.router.proxy.prefix_index import PrefixIndex
from kunserve_sglang.router.proxy.request_queue import RequestQueue
from kunserve_sglang.router.proxy.tenant_queue import TenantQueue


class Traffic:
    """Queue, requests under way, what users get, index of prefixes: the control plane's `Front`.

    `prefixes` is there only for a policy that asks for it: instances report their caches then.
    With `tenants` the queue is fair between them.
    """

    def __init__(
        self, registry: Registry, config: ClusterConfig, tenants: Tenants | None = None
    ) -> None:
        self.latency = Latency()
        self.attainment = Attainment(read_classes(config.slo_class), self.latency.clock)
        self.queue = (
            RequestQueue(registry, config)
            if tenants is None
            else TenantQueue(registry, config, tenants)
        )
        self.moves = Moves()
        self._registry = registry
        self.prefixes = PrefixIndex() if config.dispatch is DispatchPolicy.LMETRIC else None

    def held(self) -> int:
        return self.queue.held()

    def short(self) -> Collection[int]:
        return self.queue.short()

    def wanted(self) -> tuple[Wanted, ...]:
        return self.attainment.wanted()

    def latency_summary(self) -> LatencySummary:
        return self.latency.summary()

    def attainment_summary(self) -> AttainmentSummary:
        return self.attainment.summary()

    def decided_by(self, level: ServiceLevel, times: StepTimes | None) -> None:
        self.attainment.decided_by(level, times)

    def queue_status(self) -> QueueStatus:
        return self.queue.status()

    def wants_cache(self, instance: Instance) -> bool:
        return self.prefixes is not None and not self.prefixes.in_step(instance)

    def cache_reported(self, instance: Instance, report: CacheReport) -> None:
        if self.prefixes is not None:
            self.prefixes.report(instance, report)

    def room_changed(self) -> None:
        self.queue.let_in()

    def move(self, instance: Instance) -> None:
        self.moves.move(instance, self._registry.available())

    def known(self, numbers: Collection[int]) -> None:
        self.moves.keep(numbers)
        if self.prefixes is not None:
            self.prefixes.keep(numbers)

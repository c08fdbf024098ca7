"""What the proxy knows of requests and caches, as the control plane is shown it."""

from __future__ import annotations

from collections.abc import Collection

from kunserve_sglang.api.types import LatencySummary, QueueStatus
from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.core.messages import CacheReport
from kunserve_sglang.core.settings import ClusterConfig, DispatchPolicy
from kunserve_sglang.router.proxy.latency import Latency
from kunserve_sglang.router.proxy.moves import Moves
from kunserve_sglang.router.proxy.prefix_index import PrefixIndex
from kunserve_sglang.router.proxy.request_queue import RequestQueue


class Traffic:
    """Queue, requests under way, latencies and index of prefixes; a `Front` of the control plane.

    `prefixes` is there only for a policy that asks for it: instances report their caches then.
    """

    def __init__(self, registry: Registry, config: ClusterConfig) -> None:
        self.latency = Latency()
        self.queue = RequestQueue(registry, config)
        self.moves = Moves()
        self._registry = registry
        self.prefixes = PrefixIndex() if config.dispatch is DispatchPolicy.LMETRIC else None

    def held(self) -> int:
        return len(self.queue)

    def latency_summary(self) -> LatencySummary:
        return self.latency.summary()

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

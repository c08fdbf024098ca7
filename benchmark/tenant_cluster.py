"""The router's own queue and dispatch, before instances that serve in virtual time."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from benchmark.batching import BatchingInstance
from kunserve_sglang.control.registry import Registry
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.messages import Status
from kunserve_sglang.core.tenants import DEFAULT_TENANT, read_tenants
from kunserve_sglang.policy.dispatch import lmetric
from kunserve_sglang.router.http.client_request import ClientRequest, Connection
from kunserve_sglang.router.proxy.attainment import Attainment
from kunserve_sglang.router.proxy.dispatcher import Dispatcher, Weight
from kunserve_sglang.router.proxy.latency import Latency, StreamTimer
from kunserve_sglang.router.proxy.prefix_index import Prompt
from kunserve_sglang.router.proxy.promise import Promise
from kunserve_sglang.router.proxy.request_queue import RequestQueue
from kunserve_sglang.router.proxy.tenant_queue import TenantQueue
from kunserve_sglang.simulation.cluster_profile import Profile

INSTANCES = 2
_EXPECTED_SHARE = 0.7


class Cluster:
    """The router's queue and dispatch, before modelled instances."""

    def __init__(self, profile: Profile, tenants_text: str | None) -> None:
        clock = asyncio.get_running_loop().time
        config = ClusterConfig(num_instances=INSTANCES)
        self.clock = clock
        self._registry = Registry(INSTANCES, now=clock)
        self._queue = _queue(self._registry, config, tenants_text, clock)
        self._told_apart = tenants_text is not None
        self._dispatcher = Dispatcher(self._registry, ahead=self._told_apart)
        self._latency = Latency(clock)
        self._attainment = Attainment({}, clock)
        self.instances = [BatchingInstance(n, profile, self._report) for n in range(INSTANCES)]
        for instance in self.instances:
            self._registry.hello(instance.hello())
            self._registry.instances[instance.number].liveness.serves()

    async def ask(self, tenant: str, prompt: int, output: int) -> float:
        """One request to the end of its answer; returns the seconds to its first token.

        What happens to it is what `router.proxy.proxy` does with one that meets no trouble.
        """
        request = _request(tenant if self._told_apart else DEFAULT_TENANT)
        promise = Promise(self._attainment, request)
        expected = prompt + int(_EXPECTED_SHARE * output)
        weight = Weight(expected, Prompt(prompt), output)
        began = self.clock()
        await self._queue.enter(request, weight)
        try:
            has_room = self._queue.room_for(request)
            pick = self._dispatcher.pick
            instance = pick(lmetric, weight, has_room) or pick(lmetric, weight, lambda _: True)
            assert instance is not None, "no instance leaves"
            with self._dispatcher.under_way(instance, weight):
                job = self.instances[instance.number].submit(prompt, output)
                promise.timer = StreamTimer(self._latency, began, promise.first_chunk)
                first = 0.0
                while job.made < output or not job.tokens.empty():
                    await job.tokens.get()
                    promise.timer.chunk(b"data: x\n\n")
                    first = first or self.clock()
        finally:
            self._queue.leave(request, promise)
        return first - began

    def produced(self) -> int:
        return sum(instance.produced for instance in self.instances)

    def _report(self, status: Status) -> None:
        self._registry.status(status)
        self._queue.let_in()


def _queue(registry: Registry, config: ClusterConfig, text: str | None, clock: Any) -> RequestQueue:
    if text is None:
        return RequestQueue(registry, config, clock)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        return TenantQueue(registry, config, read_tenants(Path(file.name)), clock)


def _request(tenant: str) -> ClientRequest:
    scope = {"method": "POST", "path": "/generate", "headers": [], "http_version": "1.1"}
    nobody = cast(Connection, SimpleNamespace(transport=None, congested=False))
    request = ClientRequest(nobody, scope, {}, b"", keep_alive=True)
    request.tenant = tenant
    return request

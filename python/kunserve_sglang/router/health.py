"""Who can take requests: a watch over the instances, and the probes of orchestrators."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import aiohttp
from starlette.requests import Request
from starlette.responses import Response

from kunserve_sglang.config import ClusterConfig
from kunserve_sglang.router.answers import json_answer, retry_later
from kunserve_sglang.router.registry import Instance, Registry
from kunserve_sglang.router.upstream import (
    REFUSED,
    Question,
    ask,
    ask_all,
    credentials,
    question_of,
)

_TICK_S = 0.25
"""How often an instance is asked that does not serve yet, or not any more."""

_INTERVAL_S = 5.0
"""How often one that serves is asked."""

_TIMEOUT_S = 30.0
"""Above the 20 s that SGLang takes to find itself unhealthy."""


@dataclass(slots=True)
class _Watch:
    instance: Instance
    due: float = 0.0
    asking: bool = False


class HealthWatch:
    """Asks every instance for `/health` and writes down what follows from the answer.

    A 200 says that it serves and a refused connection that it is gone. A slow answer or a 503
    says neither: a busy server is not a dead server.
    """

    def __init__(
        self, registry: Registry, session: aiohttp.ClientSession, api_key: str | None
    ) -> None:
        self._question = Question(method="GET", path="/health", headers=credentials(api_key))
        self._registry = registry
        self._session = session
        self._watches: dict[int, _Watch] = {}

    async def run(self) -> None:
        """Watch until cancelled; a slow instance does not delay the others."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                for instance in self._registry.instances.values():
                    watch = self._watches.get(instance.number)
                    if watch is None or watch.instance is not instance:
                        # New, or a new process under an old number.
                        watch = self._watches[instance.number] = _Watch(instance)
                    if not watch.asking and self._is_due(watch):
                        watch.asking = True
                        tasks.create_task(self._ask(watch))
                await asyncio.sleep(_TICK_S)

    def _is_due(self, watch: _Watch) -> bool:
        return not watch.instance.available or time.monotonic() >= watch.due

    async def _ask(self, watch: _Watch) -> None:
        instance = watch.instance
        reply = await ask(self._session, instance, self._question, _TIMEOUT_S)
        watch.due = time.monotonic() + _INTERVAL_S
        watch.asking = False
        if reply.status == 200:
            instance.serving = True
            if instance.lost == REFUSED:
                instance.lost = ""
        elif reply.error == REFUSED and instance.serving:
            # Before it has served, its HTTP server is just not up yet.
            instance.lost = REFUSED


class Probes:
    """`/health`, `/health_generate`, `/liveness`, `/readiness`."""

    def __init__(
        self, registry: Registry, session: aiohttp.ClientSession, config: ClusterConfig
    ) -> None:
        self._registry = registry
        self._session = session
        self._wanted = config.num_instances

    async def health(self, request: Request) -> Response:  # noqa: ARG002 (a Starlette endpoint)
        """Whether the cluster can serve at all."""
        available = len(self._registry.available())
        if not available:
            return self._too_few(available)
        return json_answer({"status": "ok", "available": available, "expected": self._wanted})

    async def health_generate(self, request: Request) -> Response:
        """Whether every available instance generates."""
        instances = self._registry.available()
        if not instances:
            return self._too_few(0)
        question = await question_of(request)
        replies = await ask_all(self._session, instances, question, _TIMEOUT_S)
        for reply in replies:
            if reply.status != 200:
                return retry_later("unhealthy", reply.failure)
        return json_answer({"status": "ok", "available": len(instances)})

    async def liveness(self, request: Request) -> Response:  # noqa: ARG002 (a Starlette endpoint)
        """The router runs, whatever its instances do."""
        return json_answer({"status": "ok"})

    async def readiness(self, request: Request) -> Response:  # noqa: ARG002 (a Starlette endpoint)
        """Whether the cluster is complete."""
        available = len(self._registry.available())
        if available < self._wanted:
            return self._too_few(available)
        return json_answer({"status": "ok", "available": available, "expected": self._wanted})

    def _too_few(self, available: int) -> Response:
        return retry_later(
            "not_ready", f"{available} of {self._wanted} instances can take requests"
        )

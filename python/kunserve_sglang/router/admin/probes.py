"""What orchestrators ask: whether the router runs, and whether the cluster can take requests."""

from __future__ import annotations

import aiohttp
from starlette.requests import Request
from starlette.responses import Response

from kunserve_sglang.control.registry import Registry
from kunserve_sglang.control.upstream import HEALTH_TIMEOUT_S, ask_all
from kunserve_sglang.router.http.answers import json_answer, retry_later
from kunserve_sglang.router.http.questions import question_of


class Probes:
    """`/health`, `/health_generate`, `/liveness`, `/readiness`."""

    def __init__(self, registry: Registry, session: aiohttp.ClientSession) -> None:
        self._registry = registry
        self._session = session

    @property
    def _wanted(self) -> int:
        draining = [i for i in self._registry.instances.values() if i.draining]
        return len(self._registry.expected) - len(draining)

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
        replies = await ask_all(self._session, instances, question, HEALTH_TIMEOUT_S)
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
        if available < max(1, self._wanted):
            return self._too_few(available)
        return json_answer({"status": "ok", "available": available, "expected": self._wanted})

    def _too_few(self, available: int) -> Response:
        return retry_later(
            "not_ready", f"{available} of {self._wanted} instances can take requests"
        )

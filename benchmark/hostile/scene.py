"""What is attacked: one router with two instances, and what happened to each behind it."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

from benchmark.experiment import RunError
from benchmark.hostile.member import MemberMock
from benchmark.hostile.router import RouterProcess
from benchmark.hostile.worker import Arrived, StrictWorker
from kunserve_sglang.core.paths import Lookup
from kunserve_sglang.core.routes import server_routes

_INSTANCES = 2
_SERVING_TIMEOUT_S = 30.0
_HEALTHY_AGAIN_S = 15.0
_EXPECTED = frozenset(("Welcome", "Attainable"))
"""What instances are told in peace."""


class Scene:
    """Async context manager; raises `RunError` if the instances are not taken up."""

    def __init__(self, folder: Path) -> None:
        self.effects: Counter[str] = Counter()
        """What reached an instance though it needs the admin key, or a route that it has not."""
        self.router = RouterProcess(folder, _INSTANCES)
        self.workers = [StrictWorker(self._on_arrival) for _ in range(_INSTANCES)]
        routes = server_routes(os.environ).items()
        self._open = Lookup((path, True) for path, route in routes if route.handling.open)

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.router.__enter__)
        try:
            for worker in self.workers:
                await worker.start()
            self.members = [MemberMock(n, w.url) for n, w in enumerate(self.workers)]
            for member in self.members:
                member.start(self.router.control_address)
            await self.until_serving()
        except BaseException:
            await asyncio.to_thread(self.router.__exit__)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for member in self.members:
            await member.stop()
        for worker in self.workers:
            await worker.stop()
        await asyncio.to_thread(self.router.__exit__)

    @property
    def port(self) -> int:
        return self.router.port

    async def verdict(self) -> dict[str, Any]:
        """The figures that every part ends with."""
        # Instances that were held up, as by another part of this program, need a moment.
        healthy = await self._serves_within(_HEALTHY_AGAIN_S)
        for member in self.members:
            for kind, count in member.received.items():
                if kind not in _EXPECTED:
                    self.effects[f"{kind} to instance {member.number}"] = count
        return {
            "healthy": healthy,
            "tracebacks": self.router.tracebacks(),
            "admin_effects": dict(self.effects),
            "misread": sum(worker.unreadable for worker in self.workers),
        }

    def rss_mib(self) -> float:
        return self.router.rss_bytes() / (1 << 20)

    def _on_arrival(self, arrived: Arrived) -> None:
        path = arrived.target.partition("?")[0].encode()
        if not self._open.find(path):
            self.effects[f"{arrived.method} {arrived.target}"] += 1

    async def until_serving(self) -> None:
        """Raises `RunError` if the router does not know its instances, soon."""
        if not await self._serves_within(_SERVING_TIMEOUT_S):
            raise RunError("the router did not take up its instances")

    async def _serves_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.router.running:
            if await asyncio.to_thread(self.router.healthy, _INSTANCES):
                return True
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        return False

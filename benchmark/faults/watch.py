"""What the cluster says of itself around a fault, from the outside."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_INTERVAL_S = 0.05
_ASK_S = 2.0
_CALL_S = 150.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One status; `instances` by number. None: the router did not answer."""

    at: float
    instances: Mapping[int, Mapping[str, Any]] | None
    transition: bool = False


@dataclass(slots=True)
class Watch:
    """All that was seen, in order of time."""

    seen: list[Seen] = field(default_factory=list)

    def first(self, since: float, is_so: Callable[[Seen], bool]) -> float | None:
        """When something was seen first, in seconds after `since`."""
        return next((s.at - since for s in self.seen if s.at >= since and is_so(s)), None)


class Admin:
    """Calls of the admin API."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"},
            timeout=aiohttp.ClientTimeout(total=_CALL_S),
            # A connection that a router has died with is of no use.
            connector=aiohttp.TCPConnector(force_close=True),
        )

    async def close(self) -> None:
        await self._session.close()

    async def call(
        self, method: str, path: str, body: Any = None, limit_s: float = _CALL_S
    ) -> tuple[int, Any]:
        """Status and decoded answer; (0, why) where there was none."""
        timeout = aiohttp.ClientTimeout(total=limit_s)
        try:
            async with self._session.request(
                method, self._url + path, json=body, timeout=timeout
            ) as response:
                if response.content_type == "application/json":
                    return response.status, await response.json()
                return response.status, await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            return 0, f"{type(error).__name__}: {error}"

    async def seen(self) -> Seen:
        """The status now."""
        code, status = await self.call("GET", "/kunserve/status", limit_s=_ASK_S)
        now = time.monotonic()
        if code != 200:
            return Seen(now, None)
        instances = {i["id"]: i for i in status["instances"]}
        return Seen(now, instances, bool(status.get("transition")))

    async def metric(self, name: str) -> float:
        """Of the router's own; 0 if it is not there."""
        code, text = await self.call("GET", "/metrics", limit_s=10)
        if code == 200:
            for line in str(text).splitlines():
                if line.startswith(name + " "):
                    return float(line.split()[-1])
        return 0.0


@contextlib.asynccontextmanager
async def watching(admin: Admin, look: Callable[[], None]) -> AsyncIterator[Watch]:
    """Ask for the status all the time, and `look` as often, however long an answer takes."""
    watch = Watch()

    async def ask() -> None:
        while True:
            watch.seen.append(await admin.seen())
            await asyncio.sleep(_INTERVAL_S)

    async def look_around() -> None:
        while True:
            look()
            await asyncio.sleep(_INTERVAL_S)

    tasks = [asyncio.create_task(ask()), asyncio.create_task(look_around())]
    try:
        yield watch
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

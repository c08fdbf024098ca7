"""A cluster's admin API, for measurements that drop and restore by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from benchmark.experiment import RunError
from benchmark.timeline import StatusReader

_FLUSH_TIMEOUT_S = 20
"""The last answer is out a little before its request is off the books."""

_DRAIN_S = 30

_TIMEOUT_S = 90.0
"""Above the deadlines of a transition, so that its own error is what we get to see."""


class Control(StatusReader):
    """One cluster, by hand. Everything raises `RunError` if the cluster does not obey."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        super().__init__(url, session)
        self.url = url

    async def automatic(self, auto: bool) -> None:
        """Whether the cluster drops and restores by itself."""
        await self._send("PUT", "/kunserve/policy", {"auto": auto})

    async def drop(self, *instances: int) -> dict[str, Any]:
        """These instances, or all, into one group; returns the event."""
        return await self._transition("drop", {"instances": instances} if instances else {})

    async def restore(self) -> dict[str, Any]:
        """Full replicas; returns the event."""
        return await self._transition("restore", {})

    async def trace(self, seconds: float) -> dict[str, Any]:
        """What the instances do from now on, as a Chrome trace."""
        return await self._send("POST", "/kunserve/trace", {"seconds": seconds})

    async def forget(self) -> None:
        """Empty the prefix caches, so that no prompt is known from an earlier round."""
        await self._send("POST", f"/flush_cache?timeout={_FLUSH_TIMEOUT_S}", None)

    async def drain(self, number: int) -> None:
        """An instance, or a plain server, leaves when its requests are done."""
        await self._send("DELETE", f"/workers/{number}?timeout_s={_DRAIN_S}", None)

    async def owner_urls(self) -> list[str]:
        """Where the instances themselves serve, in order of their numbers."""
        return [i["url"] for i in (await self.status())["instances"]]

    async def slots_of_each(self) -> int:
        """KV token slots of one instance, the smallest if they differ."""
        return min(int(i["slots"]["capacity"]) for i in (await self.status())["instances"])

    async def _transition(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        event = await self._send("POST", f"/kunserve/{kind}", body)
        if event["status"] != "committed":
            raise RunError(f"a {kind} was {event['status']}: {event['error']}")
        return event

    async def _send(self, method: str, path: str, body: Any) -> dict[str, Any]:
        async with self._session.request(method, self._url + path, json=body) as response:
            if response.status >= 400:
                raise RunError(f"{method} {path}: {response.status} {await response.text()}")
            if response.content_type != "application/json":
                return {}
            answer: dict[str, Any] = await response.json()
            return answer


@asynccontextmanager
async def control(url: str) -> AsyncIterator[Control]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as session:
        yield Control(url, session)

"""Two tenants of a router, and what they ask for."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.router_harness import RouterCluster
from tests.support.waiting import until
from tests.unit.router.test_request_queue import queued

API, ADMIN = {"Authorization": "Bearer s3cret-api"}, {"Authorization": "Bearer s3cret-admin"}
A, B = {"Authorization": "Bearer s3cret-of-a"}, {"Authorization": "Bearer s3cret-of-b"}
FILE = """
[[tenants]]
name = "a"
key = "s3cret-of-a"
{a}
[[tenants]]
name = "b"
key = "s3cret-of-b"
{b}
"""


def described(router: RouterCluster, name: str) -> dict[str, Any]:
    listed = router.get("/kunserve/tenants", **ADMIN).json["tenants"]
    found: dict[str, Any] = next(t for t in listed if t["name"] == name)
    return found


class Streams:
    """Requests of tenants, each begun once the one before is where it should be."""

    def __init__(self, router: RouterCluster) -> None:
        self._router = router
        self._open: list[http.client.HTTPConnection] = []

    def begin(self, who: dict[str, str], name: str, **fields: Any) -> http.client.HTTPConnection:
        body = {"text": name, "stream": True, **fields}
        self._open.append(self._router.open("POST", "/generate", body, who))
        return self._open[-1]

    def run(self, who: dict[str, str], name: str, **fields: Any) -> http.client.HTTPConnection:
        """One that goes to an instance at once."""
        before = self._running()
        connection = self.begin(who, name, **fields)
        until(lambda: self._running() == before + 1)
        return connection

    def wait(self, who: dict[str, str], name: str, **fields: Any) -> http.client.HTTPConnection:
        """One that has to wait."""
        before = queued(self._router)
        connection = self.begin(who, name, **fields)
        until(lambda: queued(self._router) == before + 1)
        return connection

    def _running(self) -> int:
        return sum(i.worker.streams for i in self._router.instances)

    def close(self) -> None:
        for connection in self._open:
            connection.close()


@contextmanager
def streams(router: RouterCluster) -> Iterator[Streams]:
    begun = Streams(router)
    yield begun
    begun.close()


def finish(router: RouterCluster) -> None:
    """The only instance ends one of its streams, and gets the next one."""
    (instance,) = router.instances
    got = len(instance.worker.requests("/generate"))
    instance.worker.finish()
    until(lambda: len(instance.worker.requests("/generate")) == got + 1)

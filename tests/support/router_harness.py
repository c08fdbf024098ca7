"""A router with mock instances, and the client that tests talk to it with."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import socket
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import msgspec

from kunserve_sglang.core.choices import OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.identity import ModelIdentity
from kunserve_sglang.core.keys import MemberKeys, new_keys
from kunserve_sglang.router.server import listen, serve
from kunserve_sglang.router.settings import RouterConfig
from tests.support.background import Background
from tests.support.mock_instance import MockInstance
from tests.support.waiting import until


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, str]:
        error: dict[str, str] = self.json["error"]
        assert error["message"]
        assert error["type"]
        return error


class Client:
    """Plain HTTP to the router, one connection a call."""

    def __init__(self, port: int) -> None:
        self.port = port

    def open(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str | bytes] | None = None,
    ) -> http.client.HTTPConnection:
        """Send a request and leave the answer to the caller; closing it is a client that leaves."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        kind = {} if data is None else {"Content-Type": "application/json"}
        connection.request(method, path, data, {**kind, **(headers or {})})
        return connection

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str | bytes] | None = None,
    ) -> Answer:
        connection = self.open(method, path, body, headers)
        try:
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.call("GET", path, headers=headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        return self.call("POST", path, body, headers)

    def put(self, path: str, body: Any = None, **headers: str) -> Answer:
        return self.call("PUT", path, body, headers)


class RouterCluster(Client):
    """The product's router in this process, and mock instances that have said hello to it."""

    def __init__(
        self,
        count: int = 2,
        *,
        api_key: str | None = None,
        model: ModelIdentity | None = None,
        expect: int | None = None,
        vote_timeout_s: float = 20.0,
        **config: Any,
    ) -> None:
        self.folder = tempfile.mkdtemp(prefix="ks-")
        self._background = Background()
        self._stop = asyncio.Event()
        self.control_address = f"ipc://{self.folder}/control"
        self.config = RouterConfig(
            cluster=ClusterConfig(
                num_instances=count if expect is None else expect,
                port=0,
                overload_policy=OverloadPolicy.NONE,
                vote_timeout_s=vote_timeout_s,
                **config,
            ),
            control_address=self.control_address,
            api_key=api_key,
            model=model,
            keys=new_keys() if config.get("control_address") else None,
            state_file=f"{self.folder}/router.json",
        )
        key = self.config.cluster.read_api_key
        self.reader = {"Authorization": f"Bearer {key}"} if key else {}
        listener = listen(self.config)
        super().__init__(listener.getsockname()[1])
        self._serving = self._serve(listener)
        self.instances = [self.add(i) for i in range(count)]
        self.ready(count)

    def add(
        self,
        number: int,
        *,
        reporting: bool = True,
        address: str = "",
        keys: MemberKeys | None = None,
    ) -> MockInstance:
        """An instance on this host, unless there is an `address` with `keys` for others."""
        return MockInstance(
            number,
            address or self.control_address,
            self._background,
            reporting=reporting,
            keys=keys,
        )

    def ready(self, count: int) -> None:
        """Wait until so many instances take requests and have reported."""

        def known() -> bool:
            described = self.status()["instances"]
            return len([d for d in described if d["serving"] and "demand" in d]) == count

        until(known)

    def status(self) -> Any:
        return self.get("/kunserve/status", **self.reader).json

    def described(self, number: int) -> Any:
        return next(d for d in self.status()["instances"] if d["id"] == number)

    def event(self) -> Any:
        """The latest event."""
        events = self.get("/kunserve/events?limit=1", **self.reader).json["events"]
        return events[0] if events else None

    def stop_router(self) -> None:
        """End the router, and all that it has begun; its instances go on without it."""
        self._background.loop.call_soon_threadsafe(self._stop.set)
        self._serving.result(30)
        assert not self._background.run(_tasks_of_the_router())

    def start_router(self) -> None:
        """After `stop_router`: another one at the same port."""
        self._stop = asyncio.Event()
        cluster = msgspec.structs.replace(self.config.cluster, port=self.port)
        self.config = msgspec.structs.replace(self.config, cluster=cluster)
        self._serving = self._serve(listen(self.config))

    def close(self) -> None:
        self.stop_router()
        for instance in self.instances:
            instance.stop()
        self._background.stop()
        shutil.rmtree(self.folder)

    def _serve(self, listener: socket.socket) -> Future[None]:
        work = serve(self.config, listener, self._stop)
        return asyncio.run_coroutine_threadsafe(work, self._background.loop)


async def _tasks_of_the_router() -> list[str]:
    """Those that are still there; mock instances run on the same event loop."""
    return [name for task in asyncio.all_tasks() if "kunserve_sglang/" in (name := repr(task))]

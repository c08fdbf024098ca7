"""Requests that are held against limits, by a clock that a test turns."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import cast

from kunserve_sglang.core.service_classes import read_classes
from kunserve_sglang.policy.service_level import ServiceLevel, StepTimes
from kunserve_sglang.router.http.client_request import ClientRequest, Connection
from kunserve_sglang.router.proxy.attainment import Attainment
from kunserve_sglang.router.proxy.latency import Latency, StreamTimer
from kunserve_sglang.router.proxy.promise import Promise


class PromiseBench:
    """Limits are 100 and 10 ms, those of the class `slow` 5000 and 500."""

    def __init__(self, level: ServiceLevel | None = None, times: StepTimes | None = None) -> None:
        self.now = 1000.0
        self.latency = Latency(lambda: self.now)
        self.attainment = Attainment(read_classes(["slow=5000:500"]), lambda: self.now)
        self.attainment.decided_by(level or ServiceLevel(ttft_ms=100, tpot_ms=10), times)

    def request(
        self,
        path: str = "/generate",
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
        *,
        stream: bool | None = True,
    ) -> ClientRequest:
        given = [(n.lower().encode(), v.encode()) for n, v in (headers or {}).items()]
        scope = {"method": method, "path": path, "headers": given, "http_version": "1.1"}
        transport = SimpleNamespace(write=lambda _: None)
        client = SimpleNamespace(transport=transport, congested=False, answered=lambda _: None)
        connection = cast(Connection, client)
        request = ClientRequest(connection, scope, dict(given), b"", keep_alive=True)
        request.wants_stream = stream
        request.arrived = self.now
        return request

    def promise(self, request: ClientRequest) -> Promise:
        return Promise(self.attainment, request)

    def stream(self, request: ClientRequest, gaps_ms: list[float], promise: Promise) -> None:
        """The answer's chunks come after these pauses."""
        request.start(200, [])
        timer = promise.timer = StreamTimer(self.latency, request.arrived, promise.first_chunk)
        for gap in gaps_ms:
            self.now += gap / 1e3
            timer.chunk(b"data: x\n\n")

    def counts(self, name: str = "default") -> tuple[int, int]:
        """Of a class: requests that kept their limits, and that did not."""
        total = self.attainment.of(name).total
        return total[True], total[False]

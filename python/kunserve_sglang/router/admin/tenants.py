"""Tenants for whoever looks after the cluster: what they have, and their file read once more."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.requests import Request
from starlette.responses import Response

from kunserve_sglang.api.tenants import TenantList
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.router.http.answers import RequestError, json_answer
from kunserve_sglang.router.proxy.request_queue import RequestQueue
from kunserve_sglang.router.proxy.tenant_queue import TenantQueue
from kunserve_sglang.router.proxy.tenant_use import TenantsFile


class TenantCalls:
    """Endpoints under `/kunserve/tenants`."""

    def __init__(self, queue: RequestQueue, file: TenantsFile | None) -> None:
        self._queue = queue
        self._file = file

    async def tenants(self, request: Request) -> Response:  # noqa: ARG002 (a Starlette endpoint)
        return json_answer(self._described())

    async def reload(self, request: Request) -> Response:  # noqa: ARG002 (a Starlette endpoint)
        if self._file is not None and isinstance(self._queue, TenantQueue):
            try:
                self._file.read()
            except ConfigurationError as error:
                raise RequestError(409, "tenants_unreadable", str(error)) from error
            self._queue.apply(self._file.tenants)
        return json_answer(self._described())

    def _described(self) -> TenantList:
        queue = self._queue
        return TenantList(tenants=queue.tenants() if isinstance(queue, TenantQueue) else [])


def tenant_metrics(queue: RequestQueue) -> Iterator[Metric]:
    """Nothing without tenants."""
    if not isinstance(queue, TenantQueue):
        return
    requests = _counter("requests", "Requests of the tenant that have ended.")
    tokens = _counter("tokens", "Tokens that these took, prompts included.")
    rejected = _counter("rejected", "Requests of it that were turned away.", "reason")
    queued = _gauge("queued_requests", "Requests of it that the router holds back.")
    under_way = _gauge("in_flight_requests", "Requests of it at instances.")
    most = _gauge("in_flight_tokens", "Their prompts and the longest answers they ask for.")
    for use in queue.uses():
        label = [use.name]
        requests.add_metric(label, use.requests)
        tokens.add_metric(label, use.tokens)
        queued.add_metric(label, len(use.flow.waiting))
        under_way.add_metric(label, use.flow.requests)
        most.add_metric(label, use.flow.tokens)
        for reason, count in use.shed.items():
            rejected.add_metric([use.name, reason], count)
    yield from (requests, tokens, rejected, queued, under_way, most)


def _gauge(name: str, about: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"kunserve:tenant_{name}", about, labels=["tenant"])


def _counter(name: str, about: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"kunserve:tenant_{name}", about, labels=["tenant", *labels])

"""Who belongs to the cluster: `/workers` as SGLang's gateway has it, with draining."""

from __future__ import annotations

import logging

from starlette.requests import Request
from starlette.responses import Response
from yarl import URL

from kunserve_sglang.api.types import (
    JoinBody,
    Membership,
    WorkerBody,
    Workers,
    WorkerStats,
)
from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.descriptions import worker_of
from kunserve_sglang.control.draining import Draining
from kunserve_sglang.core.hosts import is_private
from kunserve_sglang.core.processes import this_host
from kunserve_sglang.router.admin.background import Background
from kunserve_sglang.router.http.answers import RequestError, json_answer
from kunserve_sglang.router.http.bodies import (
    read_body,
    read_migrate,
    read_timeout,
    read_wait,
    read_worker_id,
)
from kunserve_sglang.router.settings import RouterConfig

logger = logging.getLogger(__name__)


class Members:
    """Endpoints by which instances and plain servers come and go."""

    def __init__(self, control: ControlPlane, config: RouterConfig, background: Background) -> None:
        self._control = control
        self._config = config
        self._registry = control.registry
        self._draining = Draining(control)
        self._background = background

    async def workers(self, request: Request) -> Response:  # noqa: ARG002 (a Starlette endpoint)
        instances = sorted(self._registry.instances.items())
        workers = [worker_of(instance) for _, instance in instances]
        stats = WorkerStats(total=len(workers), healthy=sum(w.is_healthy for w in workers))
        return json_answer(Workers(workers=workers, total=len(workers), stats=stats))

    async def add_worker(self, request: Request) -> Response:
        body = await read_body(request, WorkerBody)
        url, key = _server_url(body.url), body.api_key
        if key is None and self._config.api_key and not is_private(url):
            key = ""  # the cluster's key goes in clear only to whom it was named for
        for known in self._registry.instances.values():
            if known.url.rstrip("/") == url:
                message = f"{url} is instance {known.number} already"
                raise RequestError(409, "worker_exists", message, "url")
        worker = self._registry.add_worker(url, key)
        logger.info("worker %d: plain SGLang at %s", worker.number, url)
        return json_answer(worker_of(worker), 201)

    async def join(self, request: Request) -> Response:
        model = (await read_body(request, JoinBody)).model
        serves = self._registry.leases.model
        if serves is not None and (difference := serves.difference(model)):
            raise RequestError(409, "other_model", f"not the cluster's {difference}", "model")
        number = self._registry.new_number(model)
        if number is None:
            raise RequestError(409, "no_number", "so many instances have joined that none is left")
        logger.info("instance %d is to join", number)
        return json_answer(self._membership(number))

    def _membership(self, number: int) -> Membership:
        cluster = self._config.cluster
        return Membership(
            instance=number,
            host=this_host(),
            control_address=self._config.control_address,
            control_tcp=self._control.hub.tcp or None,
            data_host=cluster.data_host,
            keys=self._config.keys.members if self._config.keys else None,
            api_key=self._config.api_key,
            instance_admin_key=self._config.instance_admin_key,
            owners=cluster.largest_group,
        ).sharing(cluster)

    async def drain(self, request: Request) -> Response:
        number = read_worker_id(request)
        timeout_s, wait, migrate = read_timeout(request), read_wait(request), read_migrate(request)
        instance = self._registry.instances.get(number)
        if instance is None:
            raise RequestError(404, "unknown_worker", f"there is no worker {number}", "id")
        draining = self._draining.drain(instance, timeout_s, migrate=migrate)
        task = await self._background.begin(draining, "not drained", wait=wait)
        return json_answer(worker_of(instance), 200 if task.done() else 202)


def _server_url(text: str) -> str:
    """As others have to write it, for it to be the same; raises `RequestError` (422)."""
    try:
        return str(URL(text).origin())
    except ValueError as error:
        raise RequestError(422, "invalid_field", f"url: {error}", "url") from None

"""KunServe's own API: what the cluster does, and doing it by hand."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from kunserve_sglang.api.types import (
    AcceptedPlan,
    DropBody,
    Events,
    PlanAnswer,
    PlanBody,
    PlannedGroup,
    PolicyBody,
    RestoreBody,
)
from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.coordinator import TransitionRunning
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.transition_request import (
    REQUEST_TYPES,
    DropRequest,
    TransitionRequest,
)
from kunserve_sglang.router.admin.background import Background
from kunserve_sglang.router.http.answers import RequestError, json_answer
from kunserve_sglang.router.http.bodies import (
    check_instances,
    read_body,
    read_limit,
    read_wait,
)


class Admin:
    """Endpoints under `/kunserve/`."""

    def __init__(self, control: ControlPlane, background: Background) -> None:
        self._control = control
        self._background = background

    async def status(self, request: Request) -> Response:  # noqa: ARG002 (a Starlette endpoint)
        return json_answer(self._control.status())

    async def events(self, request: Request) -> Response:
        return json_answer(Events(events=self._control.events.latest(read_limit(request))))

    async def history(self, request: Request) -> Response:  # noqa: ARG002 (a Starlette endpoint)
        return json_answer(self._control.history.latest())

    async def plan(self, request: Request) -> Response:
        """A dry run of a transition."""
        body = await read_body(request, PlanBody)
        wanted = self._request(body.kind, body.instances, body.tokens)
        return json_answer(_described(PlanAnswer, self._control.plan(wanted)))

    async def drop(self, request: Request) -> Response:
        body = await read_body(request, DropBody)
        wanted = self._request(TransitionKind.DROP, body.instances, body.tokens)
        return await self._transition(request, wanted)

    async def restore(self, request: Request) -> Response:
        body = await read_body(request, RestoreBody)
        wanted = self._request(TransitionKind.RESTORE, body.instances, UNSET)
        return await self._transition(request, wanted)

    async def policy(self, request: Request) -> Response:  # noqa: ARG002 (a Starlette endpoint)
        return json_answer(self._control.policy())

    async def set_policy(self, request: Request) -> Response:
        body = await read_body(request, PolicyBody)
        given = msgspec.to_builtins(body)
        auto = given.pop("auto", None)
        wanted = {**msgspec.to_builtins(self._control.policy()), **given}
        if wanted["restore"] >= wanted["drop"]:
            field = "restore" if "restore" in given else "drop"
            raise RequestError(
                422,
                "invalid_field",
                f"{field}: restore ({wanted['restore']:g}) must be below drop "
                f"({wanted['drop']:g}), or the cluster would drop and restore in turns",
                field,
            )
        self._control.set_policy(auto, given)
        return json_answer(self._control.policy())

    def _request(
        self, kind: TransitionKind, instances: list[int] | UnsetType, tokens: int | UnsetType
    ) -> TransitionRequest:
        """What a body asks for; raises `RequestError` if that makes no sense."""
        named = None
        if instances is not UNSET:
            check_instances(self._control.registry, instances)
            named = tuple(instances)
        if tokens is UNSET:
            return REQUEST_TYPES[kind](instances=named)
        if kind is not TransitionKind.DROP:
            message = f"tokens: a {kind} takes instances only"
            raise RequestError(422, "invalid_field", message, "tokens")
        if named is not None:
            message = "tokens: give either instances or tokens"
            raise RequestError(422, "invalid_field", message, "tokens")
        return DropRequest(tokens=tokens)

    async def _transition(self, request: Request, wanted: TransitionRequest) -> Response:
        wait = read_wait(request)
        if (running := self._control.coordinator.running) is not None:
            raise TransitionRunning(f"transition {running.epoch} ({running.kind}) is still running")
        plan = self._control.plan(wanted)
        transition = self._control.transition(wanted)
        task = await self._background.begin(transition, "transition asked for by hand", wait=wait)
        if task.done():
            return json_answer(task.result())
        return json_answer(_described(AcceptedPlan, plan), 202)


def _described(shape: type[PlanAnswer], plan: Plan) -> PlanAnswer:
    return shape(
        kind=plan.transition.kind,
        instances=plan.instances,
        groups=[_describe_group(layout) for layout in plan.transition.after],
        freed_bytes=plan.freed_bytes,
        capacity_before=plan.capacity_before,
        capacity_after=plan.capacity_after,
        reason=plan.reason,
        decision=plan.decision,
    )


def _describe_group(layout: Layout) -> PlannedGroup:
    return PlannedGroup(
        instances=layout.ids,
        layers=[m.layers for m in layout.members],
        capacity=sum(m.capacity for m in layout.members),
    )

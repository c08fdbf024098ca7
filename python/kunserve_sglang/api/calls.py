"""Every call of the admin API in one table: routes and the OpenAPI document are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from kunserve_sglang.api.events import Event
from kunserve_sglang.api.history import History
from kunserve_sglang.api.tenants import TenantList
from kunserve_sglang.api.types import (
    DRAIN_TIMEOUT_S,
    AcceptedPlan,
    Body,
    ClusterStatus,
    DropBody,
    Events,
    JoinBody,
    Limit,
    Membership,
    PlanAnswer,
    PlanBody,
    Policy,
    PolicyBody,
    Recording,
    RestoreBody,
    Seconds,
    TraceBody,
    Worker,
    WorkerBody,
    WorkerId,
    Workers,
)


class Access(StrEnum):
    """What a call does, and with that whose key it needs."""

    READ = "read"
    CHANGE = "change"


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter in the query, or in braces in the path; its type carries the limits."""

    name: str
    type: Any
    about: str
    in_path: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call: `answers` has the type of each success, `errors` the statuses of the others.

    401 and 422 need no mention where a key or a body or a parameter is asked for.
    """

    name: str
    method: str
    path: str
    access: Access
    about: str
    answers: Mapping[int, Any]
    body: type[Body] | None = None
    parameters: tuple[Parameter, ...] = field(default=())
    errors: tuple[int, ...] = field(default=())


_WAIT = Parameter(name="wait", type=bool, about="`false`: answer 202 once it has begun")

CALLS = (
    Call(
        name="status",
        method="GET",
        path="/kunserve/status",
        access=Access.READ,
        about="The cluster now: epoch, policy, transition, and every instance.",
        answers={200: ClusterStatus},
    ),
    Call(
        name="plan",
        method="POST",
        path="/kunserve/plan",
        access=Access.READ,
        about="A dry run: what a drop, restore or rebalance would do. Changes nothing.",
        answers={200: PlanAnswer},
        body=PlanBody,
        errors=(409,),
    ),
    Call(
        name="drop",
        method="POST",
        path="/kunserve/drop",
        access=Access.CHANGE,
        about="Merge groups: drop parameters and turn their memory into KV. "
        "Answers with the event once it has ended, be it committed, aborted or failed.",
        answers={200: Event, 202: AcceptedPlan},
        body=DropBody,
        parameters=(_WAIT,),
        errors=(409,),
    ),
    Call(
        name="restore",
        method="POST",
        path="/kunserve/restore",
        access=Access.CHANGE,
        about="Split groups: pull the parameters back. "
        "Answers with the event once it has ended, be it committed, aborted or failed.",
        answers={200: Event, 202: AcceptedPlan},
        body=RestoreBody,
        parameters=(_WAIT,),
        errors=(409,),
    ),
    Call(
        name="policy",
        method="GET",
        path="/kunserve/policy",
        access=Access.READ,
        about="When the cluster drops and restores by itself.",
        answers={200: Policy},
    ),
    Call(
        name="set_policy",
        method="PUT",
        path="/kunserve/policy",
        access=Access.CHANGE,
        about="Change when the cluster drops and restores by itself; answers with all of it.",
        answers={200: Policy},
        body=PolicyBody,
    ),
    Call(
        name="events",
        method="GET",
        path="/kunserve/events",
        access=Access.READ,
        about="The transitions that have ended, oldest first.",
        answers={200: Events},
        parameters=(Parameter(name="limit", type=Limit, about="only so many, the latest"),),
    ),
    Call(
        name="history",
        method="GET",
        path="/kunserve/history",
        access=Access.READ,
        about="Demand, capacity and attainment of the last half hour, one sample every 2 s.",
        answers={200: History},
    ),
    Call(
        name="trace",
        method="POST",
        path="/kunserve/trace",
        access=Access.CHANGE,
        about="Record what instances do for a while; answers with a Chrome trace.",
        answers={200: Recording},
        body=TraceBody,
        errors=(409, 504),
    ),
    Call(
        name="tenants",
        method="GET",
        path="/kunserve/tenants",
        access=Access.READ,
        about="Who shares the cluster by `--tenants`: limits, what each has now and has had.",
        answers={200: TenantList},
    ),
    Call(
        name="reload_tenants",
        method="POST",
        path="/kunserve/tenants/reload",
        access=Access.CHANGE,
        about="Read the file of `--tenants` again. If it cannot be read, all stays as it is.",
        answers={200: TenantList},
        errors=(409,),
    ),
    Call(
        name="openapi",
        method="GET",
        path="/kunserve/openapi.json",
        access=Access.READ,
        about="This document.",
        answers={200: dict[str, Any]},
    ),
    Call(
        name="workers",
        method="GET",
        path="/workers",
        access=Access.READ,
        about="The instances, as SGLang's gateway lists them.",
        answers={200: Workers},
    ),
    Call(
        name="add_worker",
        method="POST",
        path="/workers",
        access=Access.CHANGE,
        about="Send requests to a plain SGLang server as well, from when its `/health` answers. "
        "It takes no part in drops.",
        answers={201: Worker},
        body=WorkerBody,
        errors=(409,),
    ),
    Call(
        name="join",
        method="POST",
        path="/kunserve/join",
        access=Access.CHANGE,
        about="Asked by an instance before it joins: a number, and all it has to know to be one of "
        "the cluster. Refused if it would not serve the same model in the same way.",
        answers={200: Membership},
        body=JoinBody,
        errors=(409,),
    ),
    Call(
        name="drain",
        method="DELETE",
        path="/workers/{id}",
        access=Access.CHANGE,
        about="Take an instance or a plain server out: no new requests, its group is taken apart, "
        "and when its requests have ended it is told to end, and forgotten. If that cannot be, or "
        "not in time, it takes requests as before.",
        answers={200: Worker, 202: Worker},
        parameters=(
            Parameter(name="id", type=WorkerId, about="as `/workers` lists it", in_path=True),
            Parameter(
                name="timeout_s",
                type=Seconds,
                about=f"how long its requests may take to end ({DRAIN_TIMEOUT_S})",
            ),
            Parameter(
                name="migrate",
                type=bool,
                about="true: others go on with its requests, those that can be resumed",
            ),
            _WAIT,
        ),
        errors=(404, 409, 504),
    ),
)

"""The words of the admin API: every body and every answer as a type.

The router reads and writes these types, the OpenAPI document is generated from them, and the
command line decodes answers with them; so nothing here imports an HTTP server.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kunserve_sglang.api.events import Event
from kunserve_sglang.api.service import AttainmentSummary, ServiceStatus
from kunserve_sglang.core.identity import ModelIdentity
from kunserve_sglang.core.keys import MemberKeys
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.core.load import Pages, Slots
from kunserve_sglang.core.messages import Mode, TransitionKind
from kunserve_sglang.core.settings import SharedSettings
from kunserve_sglang.policy.decision import Decision
from kunserve_sglang.policy.thresholds import Thresholds

Ids = Annotated[list[int], Meta(min_length=1, description="Instances, by id.")]
Tokens = Annotated[int, Meta(gt=0, description="Token slots to gain, at least.")]
Seconds = Annotated[float, Meta(ge=0, le=86_400, description="Seconds.")]
Limit = Annotated[int, Meta(gt=0, lt=10**9)]
WorkerId = Annotated[int, Meta(ge=0, lt=10**9)]

DRAIN_TIMEOUT_S = 300
"""How long requests under way may take to end if whoever drains does not say."""

# --- bodies -------------------------------------------------------------------------------------


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A misspelled field is an error, not a default."""


class RestoreBody(Body, frozen=True, kw_only=True):
    """Whose groups to split; all of them if nothing is named."""

    instances: Ids | UnsetType = UNSET


class DropBody(Body, frozen=True, kw_only=True):
    """What to merge: these instances, or as many as bring so many slots; else one merge."""

    instances: Ids | UnsetType = UNSET
    tokens: Tokens | UnsetType = UNSET


class PlanBody(Body, frozen=True, kw_only=True):
    """What to plan; `tokens` is for drops only."""

    kind: TransitionKind = TransitionKind.DROP
    instances: Ids | UnsetType = UNSET
    tokens: Tokens | UnsetType = UNSET


class TraceBody(Body, frozen=True, kw_only=True):
    """How long to record, in seconds, and on which instances (all, if left out)."""

    seconds: Annotated[float, Meta(gt=0, le=60)] = 5.0
    instances: Ids | UnsetType = UNSET


class WorkerBody(Body, frozen=True, kw_only=True):
    """A plain SGLang server, as `http://host:port`, with the key that it takes.

    Without `api_key` it has to take the key that instances take, and gets it only where nobody else
    can read it: on this host, or with https.
    """

    url: Annotated[str, Meta(pattern=r"^https?://[^/?#@\s]+/?$", max_length=2000)]
    api_key: Annotated[str, Meta(pattern=r"^[!-~]+$", max_length=1000)] | None = None


class JoinBody(Body, frozen=True, kw_only=True):
    """What an instance that wants to join will serve."""

    model: ModelIdentity


class PolicyBody(Body, frozen=True, kw_only=True):
    """What is left out stays as it is. `restore` must be below `drop`."""

    auto: bool | UnsetType = UNSET
    drop: Annotated[float, Meta(gt=0, le=2)] | UnsetType = UNSET
    restore: Annotated[float, Meta(ge=0, lt=2)] | UnsetType = UNSET
    drop_hold_s: Seconds | UnsetType = UNSET
    restore_hold_s: Seconds | UnsetType = UNSET
    cooldown_s: Seconds | UnsetType = UNSET
    lead_s: Seconds | UnsetType = UNSET


# --- answers ------------------------------------------------------------------------------------


class Policy(Thresholds, frozen=True, kw_only=True):
    """When the cluster acts; `auto` says whether it does so by itself.

    `drop` and `restore` are fractions of the KV capacity; a condition must hold for its `hold_s`
    seconds, nothing is restored within `cooldown_s` seconds of a drop (longer after a restore that
    came too early), and demand is extrapolated by `lead_s` seconds.
    """

    auto: bool


class InstanceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One instance. `lost` says why it is not used; from `epoch` on: once it has reported.

    A `plain` SGLang server never reports, and its layers are nothing we know of. One that is
    `draining` gets no new requests and leaves when those that it has are done. One is `stalled`
    whose requests wait, could run, and do not: it gets no new ones until it has begun anew.
    `pages` are physical pages and `slots` token slots; `layers` is `[lo, hi)`, `group` the ids of
    all members in pipeline order, and `demand` the slots that would satisfy all its requests.
    """

    id: int
    url: str
    mode: Mode
    serving: bool
    in_flight: int
    plain: bool = False
    draining: bool = False
    layer_count: int | UnsetType = UNSET
    lost: str | UnsetType = UNSET
    epoch: int | UnsetType = UNSET
    group: tuple[int, ...] | UnsetType = UNSET
    layers: LayerRange | UnsetType = UNSET
    pages: Pages | UnsetType = UNSET
    slots: Slots | UnsetType = UNSET
    running: int | UnsetType = UNSET
    waiting: int | UnsetType = UNSET
    demand: int | UnsetType = UNSET
    stalled: bool | UnsetType = UNSET
    counters: dict[str, int] | UnsetType = UNSET


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds; null where there is no sample."""

    p50: float | None
    p90: float | None
    p99: float | None


class LatencySummary(msgspec.Struct, frozen=True, kw_only=True):
    """Streamed answers of the last `window_s` seconds, as they passed the router.

    `ttft_ms` is from the whole request to the first chunk of its answer, `tpot_ms` the mean time
    between the chunks of an answer; `samples` counts the first chunks.
    """

    ttft_ms: Quantiles
    tpot_ms: Quantiles
    samples: int
    window_s: float


class QueueStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the router holds back: how many requests, and how long the oldest has waited."""

    requests: int
    oldest_s: float


class ClusterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster now. `transition` is the one under way, if any.

    `service` is null until instances have said what their steps cost.
    """

    epoch: int
    policy: Policy
    service: ServiceStatus | None
    transition: Event | None
    latency: LatencySummary
    attainment: AttainmentSummary
    queue: QueueStatus
    instances: list[InstanceStatus]


class PlannedGroup(msgspec.Struct, frozen=True, kw_only=True):
    """A group as it would be: each member's layers `[lo, hi)`, and all members' token slots."""

    instances: tuple[int, ...]
    layers: list[LayerRange]
    capacity: int


class PlanAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a transition would do. Capacities are token slots of all instances taking part."""

    kind: TransitionKind
    instances: list[int]
    groups: list[PlannedGroup]
    freed_bytes: int
    capacity_before: int
    capacity_after: int
    reason: str
    decision: Decision


class AcceptedPlan(PlanAnswer, frozen=True, kw_only=True):
    """The plan of a transition that has begun; its end becomes an event."""

    accepted: bool = True


class Events(msgspec.Struct, frozen=True, kw_only=True):
    """Transitions that have ended, oldest first."""

    events: list[Event]


class TraceDetails(msgspec.Struct, frozen=True, kw_only=True):
    """When time 0 of the recording was, in Unix time; how many spans found no room in it."""

    began: float
    lost_spans: int


class Recording(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A Chrome trace, as `chrome://tracing` and Perfetto read it: one process an instance."""

    trace_events: list[dict[str, Any]]
    other_data: TraceDetails


class Membership(SharedSettings, frozen=True, kw_only=True):
    """What an instance that joins has to know; its number is its own from now on.

    On `host`, where `control_address` can be reached, it uses that; elsewhere `control_tcp`, with
    `keys`. `data_host` is where members on `host` listen for others. It must ask its clients for
    `api_key` as all do, and whoever acts on it, the router, for `instance_admin_key`. It has room
    for groups of `owners`.
    """

    instance: int
    host: str
    control_address: str
    control_tcp: str | None
    data_host: str
    keys: MemberKeys | None
    api_key: str | None
    instance_admin_key: str
    owners: int


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """An instance; `load` is the number of requests that the router has under way there.

    A `plain` one is an SGLang server that was added by hand, a `draining` one is about to leave.
    """

    id: int
    url: str
    plain: bool
    is_healthy: bool
    draining: bool
    load: int
    mode: Mode


class WorkerStats(msgspec.Struct, frozen=True, kw_only=True):
    """How many instances there are, and how many of them can take requests."""

    total: int
    healthy: int


class Workers(msgspec.Struct, frozen=True, kw_only=True):
    """The instances in the shape of SGLang's gateway."""

    workers: list[Worker]
    total: int
    stats: WorkerStats


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """`code` is for programs and never changes, `message` is for people."""

    message: str
    type: str
    code: str
    field: str | UnsetType = UNSET


class ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of every answer that is no success; `field` names what in the request is wrong."""

    error: ErrorDetail

"""Every message that crosses a process boundary, as typed, versioned structs.

The control plane and the data plane share these types and nothing else. Control messages travel
as msgpack between the router and the instances; `instance.pipeline.wire` holds the headers that
instances send one another.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.layout import Layout, MemoryProfile

PROTOCOL_VERSION = 1


class Mode(StrEnum):
    """What an instance is doing; `instance.agent.Agent` moves from one to the next."""

    INDEPENDENT = "independent"
    PREPARING = "preparing"
    COOPERATIVE = "cooperative"
    RESTORING = "restoring"
    RECOVERING = "recovering"
    DEAD = "dead"


class TransitionKind(StrEnum):
    """A drop merges groups, a restore splits one; a rebalance moves slots between its owners."""

    DROP = "drop"
    RESTORE = "restore"
    REBALANCE = "rebalance"


class Pages(msgspec.Struct, frozen=True, kw_only=True):
    """Physical pages by use; `parameters + kv + free == total` at every moment."""

    parameters: int
    kv: int
    free: int
    total: int


class Slots(msgspec.Struct, frozen=True, kw_only=True):
    """Token slots of one owner: `used` by requests, `cached` by evictable prefixes."""

    used: int
    cached: int
    capacity: int


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What an owner has to serve, in requests and in tokens.

    `demand` is the number of slots that would satisfy everybody: tokens held by running requests,
    tokens they are still expected to produce, and the same for the waiting ones (paper section 3).
    With fewer slots in all than `largest`, its running requests could not even end one by one.
    A single request may be as large as `attainable`. It is `stalled` if requests wait, could run,
    and do not.
    """

    slots: Slots
    running: int
    waiting: int
    demand: int
    largest: int = 0
    attainable: int = 0
    stalled: bool = False


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """A change from one set of layouts to another, executed by all members at once.

    `before` and `after` cover the same instances. With `live`, KV follows its layers while the
    members serve already. With `ahead`, they then fetch, while serving, what a transition to those
    layouts will need. Either way a member is done when all of that has arrived.
    """

    epoch: int
    kind: TransitionKind
    before: tuple[Layout, ...]
    after: tuple[Layout, ...]
    live: bool = False
    ahead: tuple[Layout, ...] = ()

    @property
    def instances(self) -> list[int]:
        return sorted(i for layout in self.after for i in layout.ids)

    @property
    def grows(self) -> bool:
        """Nothing but capacities changes, and none becomes smaller."""
        return len(self.before) == len(self.after) and all(
            old.placement == new.placement
            and all(n.capacity >= o.capacity for o, n in zip(old.members, new.members, strict=True))
            for old, new in zip(self.before, self.after, strict=True)
        )


class TransitionStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one member did during a transition; bytes are payload, times are milliseconds."""

    freed_bytes: int = 0
    loaded_bytes: int = 0
    sent_kv_bytes: int = 0
    moved_slots: int = 0
    remap_ms: float = 0.0
    stall_ms: float = 0.0


# --- instance -> router -------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First message of an instance: who it is, what its memory looks like, what its steps cost."""

    version: int
    instance: int
    url: str
    data_address: str
    scheduler: str
    layer_count: int
    memory: MemoryProfile
    capacity: int
    costs: CostModel | None = None


class Status(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    """Published after scheduler steps, throttled; the only input of the overload monitor."""

    instance: int
    epoch: int
    mode: Mode
    layout: Layout
    pages: Pages
    load: Load
    counters: dict[str, int] = msgspec.field(default_factory=dict)


class CacheReport(msgspec.Struct, frozen=True, kw_only=True, tag="cache"):
    """What entered and left an instance's prefix cache, as block hashes (`core.blocks`).

    A `full` report says what is there, whatever was said before. Numbers go up by one; after a gap
    the router has to ask for a full report.
    """

    instance: int
    number: int
    full: bool = False
    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()


class Vote(msgspec.Struct, frozen=True, kw_only=True, tag="vote"):
    """Answer to `Prepare`; `reason` says why not when `ok` is false."""

    call: int
    epoch: int
    ok: bool
    reason: str = ""


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """Answer to `Commit` and `Abort`; `ok` is false when the member could not finish."""

    call: int
    epoch: int
    ok: bool
    error: str = ""
    stats: TransitionStats = TransitionStats()


class Span(msgspec.Struct, frozen=True, array_like=True):
    """What an instance did: `start` in monotonic seconds of its host, `duration` in seconds."""

    name: str
    start: float
    duration: float
    details: dict[str, int] = msgspec.field(default_factory=dict)


class Traced(msgspec.Struct, frozen=True, kw_only=True, tag="traced"):
    """Answer to `Trace`: what was recorded until now, and how many spans found no room."""

    call: int
    spans: tuple[Span, ...] = ()
    lost: int = 0


# --- router -> instance -------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """The router knows the instance; status records may follow.

    With `report_cache` it has no use for changes of the prefix cache alone: the next report has to
    be a full one.
    """

    version: int
    report_cache: bool = False


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag="prepare"):
    """Phase one: stop at a step boundary, check the plan, vote.

    A member that votes yes waits `decision_s` seconds for the decision, then goes on as before.
    """

    call: int
    transition: Transition
    decision_s: float


class Commit(msgspec.Struct, frozen=True, kw_only=True, tag="commit"):
    call: int
    epoch: int
    deadline_s: float


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    call: int
    epoch: int
    reason: str


class Lost(msgspec.Struct, frozen=True, kw_only=True, tag="lost"):
    """The group of layout `broken` has come apart: give it up and come back alone, as `epoch`.

    `instances` are gone, or alone already. Needs no answer, and means nothing to a member that runs
    by another layout; so it can be said again until the status shows that it was heard.
    """

    epoch: int
    broken: int
    instances: tuple[int, ...]

    @property
    def reason(self) -> str:
        """What has happened, in words."""
        if not self.instances:
            return "the group has come apart"
        names, many = ", ".join(map(str, self.instances)), len(self.instances) > 1
        return f"instance{'s' * many} {names} {'are' if many else 'is'} gone"


class Trace(msgspec.Struct, frozen=True, kw_only=True, tag="trace"):
    """Begin to record spans, or end it and hand them over."""

    call: int
    record: bool


class Leave(msgspec.Struct, frozen=True, kw_only=True, tag="leave"):
    """The instance is out of the cluster and has nothing left to do: end. Needs no answer."""

    reason: str


class Attainable(msgspec.Struct, frozen=True, kw_only=True, tag="attainable"):
    """A single request may count on this many token slots. Needs no answer."""

    slots: int


ToRouter = Hello | Status | CacheReport | Vote | Done | Traced
ToInstance = Welcome | Prepare | Commit | Abort | Lost | Trace | Leave | Attainable

_to_router: msgspec.msgpack.Decoder[ToRouter] = msgspec.msgpack.Decoder(ToRouter)
_to_instance: msgspec.msgpack.Decoder[ToInstance] = msgspec.msgpack.Decoder(ToInstance)
_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def decode_to_router(data: bytes) -> ToRouter:
    """Raises `msgspec.DecodeError` (also for a message of another protocol shape)."""
    return _to_router.decode(data)


def decode_to_instance(data: bytes) -> ToInstance:
    """Raises `msgspec.DecodeError` (also for a message of another protocol shape)."""
    return _to_instance.decode(data)


def connection_name(instance: int) -> bytes:
    """The identity under which an instance's control connection is known to the router."""
    return f"instance-{instance}".encode()


def to_json_types(value: Any) -> Any:
    """Structs and enums as plain JSON types, for HTTP answers."""
    return msgspec.to_builtins(value)

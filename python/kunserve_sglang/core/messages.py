"""Every message that crosses a process boundary, as typed, versioned structs.

Control messages travel as msgpack between the router and the instances; the headers that instances
send one another are in `instance.packets.wire`.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from kunserve_sglang.core.bounds import Count, InstanceNumber, Real, Size
from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.decoding import decode
from kunserve_sglang.core.first_token import FirstTokenLimit
from kunserve_sglang.core.layout import Layout, MemoryProfile
from kunserve_sglang.core.load import Load, Pages

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


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """A change from one set of layouts to another, executed by all members at once.

    `before` and `after` cover the same instances. With `live`, KV follows its layers while the
    members serve already. With `ahead`, they then fetch, while serving, what a transition to those
    layouts will need. Either way a member is done when all of that has arrived. For an `urgent` one
    somebody waits: what moves while serving gets as much time as what is computed.
    """

    epoch: Count
    kind: TransitionKind
    before: tuple[Layout, ...]
    after: tuple[Layout, ...]
    live: bool = False
    ahead: tuple[Layout, ...] = ()
    urgent: bool = False

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

    freed_bytes: Count = 0
    loaded_bytes: Count = 0
    sent_kv_bytes: Count = 0
    moved_slots: Count = 0
    remap_ms: Real = 0.0
    stall_ms: Real = 0.0


# --- instance -> router -------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First message of an instance: its memory, what its steps cost; `process` never recurs.

    Instances with the same `host` share memory.
    """

    version: int
    instance: InstanceNumber
    url: str
    data_address: str
    scheduler: str
    layer_count: Size
    memory: MemoryProfile
    capacity: Count
    costs: CostModel | None = None
    process: Count = 0
    host: str = ""


class Status(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    """Published after scheduler steps, throttled, and numbered by process from 1 on."""

    instance: InstanceNumber
    epoch: Count
    mode: Mode
    layout: Layout
    pages: Pages
    load: Load
    counters: dict[str, Count] = msgspec.field(default_factory=dict)
    process: Count = 0
    number: Count = 0


class CacheReport(msgspec.Struct, frozen=True, kw_only=True, tag="cache"):
    """What entered and left an instance's prefix cache, as block hashes (`core.blocks`).

    A `full` report says what is there, whatever was said before. Numbers go up by one; after a gap
    the router has to ask for a full report.
    """

    instance: InstanceNumber
    number: Count
    full: bool = False
    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()


class Vote(msgspec.Struct, frozen=True, kw_only=True, tag="vote"):
    """Answer to `Prepare`; `reason` says why not when `ok` is false."""

    call: int
    epoch: Count
    ok: bool
    reason: str = ""


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """Answer to `Commit` and `Abort`; `ok` is false when the member could not finish."""

    call: int
    epoch: Count
    ok: bool
    error: str = ""
    stats: TransitionStats = TransitionStats()


class Span(msgspec.Struct, frozen=True, array_like=True):
    """What an instance did: `start` in monotonic seconds of its host, `duration` in seconds."""

    name: str
    start: Real
    duration: Real
    details: dict[str, int] = msgspec.field(default_factory=dict)


class Traced(msgspec.Struct, frozen=True, kw_only=True, tag="traced"):
    """Answer to `Trace`: what was recorded until now, and how many spans found no room."""

    call: int
    spans: tuple[Span, ...] = ()
    lost: Count = 0


# --- router -> instance -------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """The router knows the instance; status records may follow.

    With `report_cache` the next report of the prefix cache has to be a full one.
    """

    version: int
    report_cache: bool = False


class Greet(msgspec.Struct, frozen=True, kw_only=True, tag="greet"):
    """Say hello: the router has not met who reports to it."""


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag="prepare"):
    """Phase one: stop at a step boundary, check the plan, vote.

    A member that votes yes waits `decision_s` seconds for the decision, then goes on as before.
    """

    call: int
    transition: Transition
    decision_s: Real


class Commit(msgspec.Struct, frozen=True, kw_only=True, tag="commit"):
    call: int
    epoch: Count
    deadline_s: Real


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    call: int
    epoch: Count
    reason: str


class Lost(msgspec.Struct, frozen=True, kw_only=True, tag="lost"):
    """The group of layout `broken` has come apart: give it up and come back alone, as `epoch`.

    `instances` are gone, or alone already. Needs no answer, and means nothing to a member that runs
    by another layout; so it can be said again until the status shows that it was heard.
    """

    epoch: Count
    broken: Count
    instances: tuple[InstanceNumber, ...]

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
    """What to admit: a single request may count on this many token slots. Needs no answer.

    No more than `running` requests are to run at once; 0: as many as there are slots for. Those
    that can have their first token in time go before those that cannot any more.
    """

    slots: Count
    running: Count = 0
    first_token: FirstTokenLimit = FirstTokenLimit()


ToRouter = Hello | Status | CacheReport | Vote | Done | Traced
ToInstance = Welcome | Greet | Prepare | Commit | Abort | Lost | Trace | Leave | Attainable

_to_router: msgspec.msgpack.Decoder[ToRouter] = msgspec.msgpack.Decoder(ToRouter)
_to_instance: msgspec.msgpack.Decoder[ToInstance] = msgspec.msgpack.Decoder(ToInstance)
_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def decode_to_router(data: bytes) -> ToRouter:
    """Raises `msgspec.DecodeError` (also for a message of another protocol shape)."""
    return decode(_to_router, data)


def decode_to_instance(data: bytes) -> ToInstance:
    """Raises `msgspec.DecodeError` (also for a message of another protocol shape)."""
    return decode(_to_instance, data)


def connection_name(instance: int) -> bytes:
    """The identity under which an instance's control connection is known to the router."""
    return f"instance-{instance}".encode()

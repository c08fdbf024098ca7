"""Where a request has been, and whether it may be tried elsewhere."""

from __future__ import annotations

from kunserve_sglang.control.registry import Instance
from kunserve_sglang.router.http.answers import error_event
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.proxy.idempotency import KeyedRequest
from kunserve_sglang.router.proxy.journal import Journal
from kunserve_sglang.router.proxy.promise import Promise

MAX_LOSSES = 2
"""So many instances may be lost while they have one request: it may well be the reason. It is none
for a host that cannot be reached any more."""


class Attempts:
    """The instances that one request was sent to.

    `lost` are those that broke off before the answer was whole, with what they said last. A new
    process under the number of such a one is another instance. `promise` is about its answer,
    whoever gives it. `journal` is there if the request may ask for a stream that can be resumed.
    `moving` says that its instance is about to be left, and `since` when one was left first.
    `keyed` is there if its client may ask again, and `holder` has its answer already.
    """

    __slots__ = (
        *("_holder", "_left", "_losses", "_refusing"),
        *("journal", "keyed", "lost", "moving", "promise", "since"),
    )

    def __init__(
        self,
        promise: Promise,
        journal: Journal | None,
        keyed: KeyedRequest | None = None,
        holder: Instance | None = None,
    ) -> None:
        self.promise = promise
        self.journal = journal
        self.keyed = keyed
        self._holder = holder
        self.lost: list[str] = []
        self._losses = 0
        self.moving = False
        self.since: float | None = None
        self._left: list[Instance] = []
        self._refusing: list[Instance] = []

    def __bool__(self) -> bool:
        return bool(self._left or self._refusing)

    @property
    def accepted(self) -> bool:
        """Whether an instance has had the request: then it is not turned away for want of room."""
        return self.since is not None

    def take_holder(self) -> Instance | None:
        """It is tried first, and once."""
        holder, self._holder = self._holder, None
        return holder

    def may_try(self, instance: Instance) -> bool:
        return self.suits(instance) and not _among(self._refusing, instance)

    def suits(self, instance: Instance) -> bool:
        """Whether it may be tried, now or when it has room.

        A plain server knows no journals, so it cannot go on with a stream.
        """
        if instance.plain and self.journal is not None and self.journal.events:
            return False
        return not _among(self._left, instance)

    def may_go_on(self, request: ClientRequest) -> bool:
        """Whether another instance may answer, after what has been delivered."""
        if not request.started:
            return True
        return self.journal is not None and self.journal.resumable

    def refused_by(self, instance: Instance) -> None:
        """It cannot have run the request: it was out of reach, or had no room."""
        self._refusing.append(instance)

    def look_again(self) -> None:
        """Those that had no room may have some now."""
        self._refusing.clear()

    def unfit(self, instance: Instance) -> None:
        """It cannot go on with what has begun."""
        self._left.append(instance)

    def moved_from(self, instance: Instance, now: float) -> None:
        """It had the request, and is in order."""
        self.moving = False
        self._leave(instance, now)

    def lost_with(self, instance: Instance, how: str, now: float) -> None:
        """It had the request, and may have run some of it."""
        self.lost.append(f"instance {instance.number} {how}")
        self._losses += 1
        self._leave(instance, now)

    def vanished_with(self, instance: Instance, how: str, now: float) -> None:
        """Its host cannot be reached. When it can be again, the instance may be tried again.

        But it may not go on with a stream, which it may be making still.
        """
        self.lost.append(f"instance {instance.number} {how}")
        if self.journal is not None and self.journal.events:
            self._leave(instance, now)
            return
        self._refusing.append(instance)
        self.since = self.since or now

    def _leave(self, instance: Instance, now: float) -> None:
        self._left.append(instance)
        self.since = self.since or now

    @property
    def exhausted(self) -> bool:
        """Whether it must not be tried again."""
        return self._losses >= MAX_LOSSES

    def why_lost(self) -> str:
        """For its client."""
        journal = self.journal
        if self.lost and journal is not None and journal.kept and not journal.resumable:
            return f"{self.lost[-1]}, and this stream cannot be resumed"
        if self.exhausted:
            return f"the request is not tried again: {', '.join(self.lost)} while they had it"
        why = self.lost[-1] if self.lost else "its instance leaves"
        return f"{why}, and no other can take the request"

    def last_event(self, request: ClientRequest) -> bytes:
        """For a stream that cannot go on."""
        return error_event(request.scope["path"], 502, "stream_lost", self.why_lost())


def _among(instances: list[Instance], instance: Instance) -> bool:
    """By identity: what a record says of an instance changes all the time."""
    return any(instance is one for one in instances)

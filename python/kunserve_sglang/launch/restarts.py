"""Whether and when an instance is started again, and when one that does nothing is ended. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 60.0

GOOD_SERVICE_S = 300.0
"""After serving for so long, what was before is forgotten."""

STALLED_AFTER_S = 50.0
"""An instance that stands still for so long does not come round any more.

One that can ends by itself before, and so does a wait for peers, which looks the same from here.
"""

END_GRACE_S = 10.0
"""How long one that is asked to end may take."""


class Remedy(Enum):
    """What is to be done about an instance now."""

    NONE = auto()
    START = auto()
    ASK_TO_END = auto()
    KILL = auto()
    GIVE_UP = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What is seen of one instance: of its process, and as far as the router knows."""

    running: bool
    left: bool = False
    """Whether it has ended in good order, because it was to leave."""
    serving: bool = False
    stalled: bool = False


class Restarts:
    """The decisions about one instance, or about a router.

    Times are seconds of the caller's monotonic clock. The first restart comes after
    `first_delay_s`, each that follows after twice the time, up to `MAX_DELAY_S`. After `limit` of
    them without good service between, it is given up. One that stands still for `stalled_after_s`
    is ended.
    """

    def __init__(
        self,
        limit: int,
        first_delay_s: float = FIRST_DELAY_S,
        stalled_after_s: float = STALLED_AFTER_S,
    ) -> None:
        self.count = 0
        self._first_delay_s = first_delay_s
        self._stalled_after_s = stalled_after_s
        self.due: float | None = None
        self._limit = limit
        self._given_up = False
        self._serves_since: float | None = None
        self._stalled_since: float | None = None
        self._asked_at: float | None = None

    @property
    def over(self) -> bool:
        """Whether it will not be started again, should it not run."""
        return self._given_up or self._limit == 0

    def decide(self, sight: Sight, now: float) -> Remedy:
        """What to do; whoever asks does it."""
        if self.over or sight.left:
            return Remedy.NONE
        return self._running(sight, now) if sight.running else self._ended(now)

    def _running(self, sight: Sight, now: float) -> Remedy:
        if self._asked_at is not None:
            return Remedy.KILL if now - self._asked_at > END_GRACE_S else Remedy.NONE
        if not sight.stalled:
            self._stalled_since = None
            if sight.serving and self._serves_since is None:
                self._serves_since = now
            return Remedy.NONE
        if self._stalled_since is None:
            self._stalled_since = now
        if now - self._stalled_since <= self._stalled_after_s:
            return Remedy.NONE
        self._asked_at = now
        return Remedy.ASK_TO_END

    def _ended(self, now: float) -> Remedy:
        if self.due is not None:
            if now < self.due:
                return Remedy.NONE
            self.due = None
            return Remedy.START
        if self._serves_since is not None and now - self._serves_since >= GOOD_SERVICE_S:
            self.count = 0
        self._serves_since = self._stalled_since = self._asked_at = None
        if self.count >= self._limit:
            self._given_up = True
            return Remedy.GIVE_UP
        self.due = now + min(self._first_delay_s * 2**self.count, MAX_DELAY_S)
        self.count += 1
        return Remedy.NONE

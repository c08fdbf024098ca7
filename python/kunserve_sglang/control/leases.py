"""Numbers of instances that are to join, and what they said that they would serve. Pure.

A number is lent to whoever asks. If no instance greets by it in time, it comes back; so those who
ask and never come use up nothing, and what they would have served binds nobody. What the cluster
serves is what it was launched with, or else what the first joined instance serves that is here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from kunserve_sglang.core.identity import ModelIdentity

LEASE_S = 1800.0
"""Loading a large model from a network takes many minutes."""


@dataclass(slots=True)
class _LentNumber:
    model: ModelIdentity
    ends: float
    used: bool = False


class Lent(msgspec.Struct, frozen=True, kw_only=True):
    """A number that is lent; `used` once an instance has greeted by it."""

    number: int
    model: ModelIdentity
    used: bool


class SavedLeases(msgspec.Struct, frozen=True, kw_only=True):
    """For a router that comes after this one."""

    next_number: int
    lent: tuple[Lent, ...]
    returned: tuple[int, ...]


class Leases:
    """Times are seconds of the caller's monotonic clock."""

    def __init__(self, first: int, end: int, model: ModelIdentity | None = None) -> None:
        """Numbers from `first` on, below `end`. `model` is what the cluster was launched with."""
        self._next = first
        self._end = end
        self._launched_with = model
        self._leases: dict[int, _LentNumber] = {}
        self._returned: list[int] = []

    @property
    def model(self) -> ModelIdentity | None:
        """What the cluster serves; None while nothing is known."""
        if self._launched_with is not None:
            return self._launched_with
        return next((lease.model for lease in self._leases.values() if lease.used), None)

    def take(self, model: ModelIdentity, now: float, known: Collection[int]) -> int | None:
        """A number that nobody has; `known` have one without asking. None if none is left.

        One that somebody has had is only given again when there is no other.
        """
        for number in [
            n for n, lease in self._leases.items() if not lease.used and lease.ends < now
        ]:
            self.give_back(number)
        while self._next < self._end or self._returned:
            if self._next < self._end:
                number, self._next = self._next, self._next + 1
            else:
                number = self._returned.pop(0)
            if number not in known:
                self._leases[number] = _LentNumber(model, now + LEASE_S)
                return number
        return None

    def admits(self, number: int) -> bool:
        """Whether the instance that greets by this number serves what the cluster does."""
        lease = self._leases.get(number)
        if lease is None or self.model is None:
            return True
        return not self.model.difference(lease.model)

    def use(self, number: int) -> None:
        """An instance has greeted by it."""
        if number in self._leases:
            self._leases[number].used = True

    def saved(self) -> SavedLeases:
        return SavedLeases(
            next_number=self._next,
            lent=tuple(
                Lent(number=n, model=lease.model, used=lease.used)
                for n, lease in self._leases.items()
            ),
            returned=tuple(self._returned),
        )

    def take_over(self, saved: SavedLeases, now: float) -> None:
        """Go on where another router has ended; what it had lent is lent from now on."""
        self._next = max(self._next, saved.next_number)
        self._returned = list(saved.returned)
        self._leases = {
            lent.number: _LentNumber(lent.model, now + LEASE_S, lent.used) for lent in saved.lent
        }

    def give_back(self, number: int) -> None:
        """Its instance has left, or never came."""
        if self._leases.pop(number, None) is not None:
            self._returned.append(number)

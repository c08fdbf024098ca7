"""How much room an instance has while tenants share it, and what of that is kept free. Pure.

An instance serves in order of arrival, and nobody who runs there is interrupted. So whoever should
not wait behind a burst has to find room that the burst was not given:

- *In its queue.* Without tenants an instance is sent as many requests as it could want, up to
  hundreds. With tenants it gets few more than it runs: each report of what has begun to run there
  makes room for as many again, and each that ends for another one. That costs nothing while
  requests follow one another; a burst into an idle cluster takes some reports longer to spread.
- *In its memory.* Slots are kept free for what tenants who have little under way had lately at
  their peak and have not now, and always for an eighth. That much less of a burst runs at once.

What is kept is for tenants who have little under way (`policy.fair_queueing`), and so nothing is
lost for good: if only they come, all of it is theirs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from kunserve_sglang.core.load import Load
from kunserve_sglang.policy.queueing import in_flight_limit

_READY = 2
"""Requests that wait at an instance, at least: its next batch need not wait for the router."""

_READY_SHARE = 16
"""Of so many that run one more may wait: it can grow by that much with each report."""

_LEAST_KEPT, _MOST_KEPT = 1 / 8, 1 / 2
_MARGIN = 1 / 16
"""Shares of the slots. The margin is for what one instance gets more of than others."""


class SharedRoom(NamedTuple):
    """For how many requests more there is room at an instance; it may be less than none.

    `most` is for tenants who have little under way, `open` for everybody.
    """

    open: float
    most: float


def kept_share(reserved: float, capacity: int) -> float:
    """Which share of all slots, `capacity`, is kept free to have `reserved` of them at hand."""
    share = reserved / capacity if capacity else 0.0
    return min(_MOST_KEPT, max(_LEAST_KEPT, share + _MARGIN))


def shared_room(
    given: int | None,
    load: Load | None,
    full_capacity: int,
    in_flight: int,
    kept_slots: float = _LEAST_KEPT,
) -> SharedRoom:
    """Of an instance with so many requests in flight; `kept_slots` is the share that is kept free.

    The first arguments are as `in_flight_limit`'s. A plain server says nothing of its slots, and
    without `given` nothing of its queue.
    """
    if load is None or given is not None:
        limit = in_flight_limit(given, load, full_capacity)
        kept = 0.0 if math.isinf(limit) else limit // _READY_SHARE
    else:
        kept = max(_READY, load.running // _READY_SHARE)
        limit = load.running + 2 * kept
    room = SharedRoom(open=limit - kept - in_flight, most=limit - in_flight)
    if load is None:
        return room
    return SharedRoom(open=min(room.open, _further(load, in_flight, kept_slots)), most=room.most)


def short_of_slots(load: Load, in_flight: int, kept_slots: float = _LEAST_KEPT) -> bool:
    """Whether its slots are in demand but for the share that is kept free, and less than one mean
    request needs."""
    return _further(load, in_flight, kept_slots) < 1


def fits(load: Load, in_flight: int, tokens: int) -> bool:
    """Whether it has slots for a request of so many tokens now, as far as it says."""
    return _demand(load, in_flight) + tokens <= load.slots.capacity


def _further(load: Load, in_flight: int, kept_slots: float) -> float:
    """How many requests more the slots are enough for, if they need what the others do."""
    demand, known = _demand(load, in_flight), max(in_flight, load.running + load.waiting)
    if not demand or not known:
        return math.inf  # of the first ones nothing is known
    free = (1 - kept_slots) * load.slots.capacity - demand
    return max(0, math.floor(free * known / demand))


def _demand(load: Load, in_flight: int) -> float:
    """Requests that are too recent for its report are taken to need what the others do."""
    known = load.running + load.waiting
    return load.demand * max(1.0, in_flight / known) if known else load.demand

"""What a cluster did lately, as the admin API tells of it."""

from __future__ import annotations

import msgspec


class HistorySample(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster at one `time`, in Unix time by the router's clock.

    `demand` and `capacity` are token slots of all instances that report, `attainment` is the share
    of the requests judged in the minute before that kept their limits; null without any.
    """

    time: float
    demand: int
    capacity: int
    attainment: float | None


class History(msgspec.Struct, frozen=True, kw_only=True):
    """One sample every `interval_s` seconds of the last `kept_s`, oldest first.

    `now` is what the clock says by which samples and events have their times.
    """

    now: float
    interval_s: float
    kept_s: float
    samples: list[HistorySample]

"""What users want, as the admin API tells of it."""

from __future__ import annotations

import msgspec


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The limits that a request of usual length is to keep, in milliseconds.

    `weighed`: drops and restores are decided by them. `slowness`: how many times as long as
    instances have measured decode steps have lately taken; `slowness_together`: in groups, when
    there last was one, and `slowness_across`: in those across hosts.
    """

    ttft_ms: float
    tpot_ms: float
    weighed: bool
    slowness: float
    slowness_together: float
    slowness_across: float


class ClassAttainment(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one class that were judged: how many, and how many of them kept their limits.

    The limits are those of a request of usual length that names none of its own, in milliseconds;
    null while they are not known. `attainment` is the share that kept theirs; null without any.
    """

    name: str
    ttft_ms: float | None
    tpot_ms: float | None
    requests: int
    kept: int
    attainment: float | None


class AttainmentSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the requests that were judged in the last `window_s` seconds, by class."""

    window_s: float
    classes: list[ClassAttainment]

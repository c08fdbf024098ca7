"""What users want, as the admin API tells of it."""

from __future__ import annotations

import msgspec


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The limits that a request of usual length is to keep, in milliseconds.

    `weighed`: drops and restores are decided by them. `slowness`: how many times as long decode
    steps have lately taken as instances have measured.
    """

    ttft_ms: float
    tpot_ms: float
    weighed: bool
    slowness: float

"""When the monitor acts; a leaf, so that the admin API can name it without the monitor."""

from __future__ import annotations

import msgspec


class Thresholds(msgspec.Struct, frozen=True, kw_only=True):
    """Fractions of KV capacity, and times in seconds.

    A condition must hold for its `hold_s`; nothing is restored within `cooldown_s` of a drop, and
    longer if the last restore turned out to be too early. `lead_s` is how far ahead demand is
    extrapolated: about as long as it takes to notice and to drop.
    """

    drop: float = 0.95
    restore: float = 0.5
    drop_hold_s: float = 0.2
    restore_hold_s: float = 3.0
    cooldown_s: float = 5.0
    lead_s: float = 1.0

"""What some flags of a cluster let one choose between."""

from __future__ import annotations

from enum import StrEnum


class OverloadPolicy(StrEnum):
    """What to do when the KV pools overflow: weigh it, drop parameters, or queue as others do."""

    DROP = "drop"
    DROP_ALWAYS = "drop-always"
    NONE = "none"


class DispatchPolicy(StrEnum):
    """How the router picks an instance for a request; `policy.dispatch` has them."""

    ROUND_ROBIN = "round_robin"
    LEAST_LOAD = "least_load"
    LMETRIC = "lmetric"


class MicroBatches(StrEnum):
    """How an owner in a group forms micro-batches: by predicted time, or one at a time."""

    LOOKAHEAD = "lookahead"
    ONE = "one"

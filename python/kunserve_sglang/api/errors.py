"""What a call of the router can raise."""

from __future__ import annotations

from kunserve_sglang.core.errors import KunServeError


class CallError(KunServeError):
    """The call has not succeeded; one line says why."""


class Refused(CallError):
    """The router has answered, and it says no."""


class Usage(CallError):
    """The call makes no sense as it was given; the router was not asked."""


class Unreachable(CallError):
    """Nobody answered in time, or not a KunServe router."""

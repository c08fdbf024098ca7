"""What a request says of its priority in the router's queue."""

from __future__ import annotations

from starlette.responses import Response

from kunserve_sglang.core.errors import KunServeError
from kunserve_sglang.policy.queueing import HIGHEST_PRIORITY, LOWEST_PRIORITY
from kunserve_sglang.router.http.answers import error_answer
from kunserve_sglang.router.http.client_request import ClientRequest

PRIORITY_HEADER = "X-KunServe-Priority"

_PRIORITY_HEADER = PRIORITY_HEADER.lower().encode()
_PRIORITIES = {str(p).encode(): p for p in range(LOWEST_PRIORITY, HIGHEST_PRIORITY + 1)}
_PRIORITIES |= {b"+" + text: p for text, p in _PRIORITIES.items() if p >= 0}


class TurnedAway(KunServeError):
    """The request goes to no instance and gets this answer."""

    def __init__(self, answer: Response) -> None:
        super().__init__(f"turned away with {answer.status_code}")
        self.answer = answer


def read_priority(request: ClientRequest) -> int:
    """From `X-KunServe-Priority`; 0 without it. Raises `TurnedAway` with a 400."""
    if _PRIORITY_HEADER not in request.headers:
        return 0
    given = [value for name, value in request.scope["headers"] if name == _PRIORITY_HEADER]
    priority = _PRIORITIES.get(given[0].strip()) if len(given) == 1 else None
    if priority is None:
        message = (
            f"{PRIORITY_HEADER}: one whole number from {LOWEST_PRIORITY} to {HIGHEST_PRIORITY} "
            "is expected"
        )
        raise TurnedAway(error_answer(400, "bad_priority", message, field=PRIORITY_HEADER))
    return priority

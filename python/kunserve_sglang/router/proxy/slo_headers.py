"""What a request says of its own limits."""

from __future__ import annotations

from kunserve_sglang.core.service_classes import DEFAULT_CLASS, read_limit
from kunserve_sglang.policy.service_level import UNNAMED, ServiceLevel
from kunserve_sglang.router.http.answers import RequestError
from kunserve_sglang.router.http.client_request import ClientRequest

CLASS_HEADER = "X-KunServe-Class"
TTFT_HEADER = "X-KunServe-SLO-TTFT-MS"
TPOT_HEADER = "X-KunServe-SLO-TPOT-MS"

_NAMES = {name.lower().encode(): name for name in (CLASS_HEADER, TTFT_HEADER, TPOT_HEADER)}
_NOTHING = DEFAULT_CLASS, UNNAMED


def read_slo(request: ClientRequest) -> tuple[str, ServiceLevel]:
    """The class that the request names, and the limits. Raises `RequestError` with a 400."""
    if _NAMES.keys().isdisjoint(request.headers):
        return _NOTHING  # as nearly all
    given: dict[str, str] = {}
    for raw_name, value in request.scope["headers"]:
        name = _NAMES.get(raw_name)
        if name is None:
            continue
        if name in given:
            raise RequestError(400, "bad_limit", f"{name}: one is expected, not several", name)
        given[name] = value.decode("latin-1").strip(" \t")
    level = ServiceLevel(ttft_ms=_limit(given, TTFT_HEADER), tpot_ms=_limit(given, TPOT_HEADER))
    return given.get(CLASS_HEADER, DEFAULT_CLASS), level


def _limit(given: dict[str, str], name: str) -> float | None:
    if name not in given:
        return None
    limit = read_limit(given[name])
    if limit is None:
        message = f"{name}: milliseconds are expected, as a number above 0"
        raise RequestError(400, "bad_limit", message, name)
    return limit

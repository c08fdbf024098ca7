"""What the admin API tells of tenants."""

from __future__ import annotations

import msgspec


class TenantStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant: its weight and limits (null: none), what it has now, and what it has had.

    `in_flight` requests are at instances, and `in_flight_tokens` are their prompts and the longest
    answers that they ask for; `queued` ones wait in the router. Since the router has begun,
    `requests` have ended and took `tokens`, prompts included, and `rejected` ones were turned away.
    """

    name: str
    weight: float
    max_requests: int | None
    max_tokens: int | None
    max_queued: int | None
    in_flight: int
    in_flight_tokens: int
    queued: int
    requests: int
    tokens: int
    rejected: int


class TenantList(msgspec.Struct, frozen=True, kw_only=True):
    """All tenants, the default one first; none without `--tenants`."""

    tenants: list[TenantStatus]

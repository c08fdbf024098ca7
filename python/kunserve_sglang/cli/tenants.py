"""Tenants as a table."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kunserve_sglang.api.tenants import TenantList


def tenants_view(listed: TenantList) -> RenderableType:
    """One a line, with what it has and may have."""
    if not listed.tenants:
        return Text("no tenants: everybody shares one queue (--tenants)")
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("tenant", "weight", "running", "tokens", "queued", "ended", "took", "rejected"):
        table.add_column(name, no_wrap=True, justify="left" if name == "tenant" else "right")
    for tenant in listed.tenants:
        table.add_row(
            tenant.name,
            f"{tenant.weight:g}",
            _of(tenant.in_flight, tenant.max_requests),
            _of(tenant.in_flight_tokens, tenant.max_tokens),
            _of(tenant.queued, tenant.max_queued),
            f"{tenant.requests:,}",
            f"{tenant.tokens:,}",
            f"{tenant.rejected:,}",
        )
    return table


def _of(number: int, limit: int | None) -> str:
    return f"{number:,}" if limit is None else f"{number:,} / {limit:,}"

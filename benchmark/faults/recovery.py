"""Until a cluster is as it was before a fault."""

from __future__ import annotations

import asyncio
import time

from benchmark.experiment import RunError
from benchmark.faults.cluster import TOTAL, FaultedCluster
from benchmark.faults.watch import Admin, Seen

_LOOK_S = 0.2
_RESTORE_EVERY_S = 2.0


async def until_well(cluster: FaultedCluster, admin: Admin, limit_s: float) -> None:
    """All instances serve alone and have nothing to do; what nobody starts again is forgotten.

    Raises `RunError` with what is amiss if that takes too long.
    """
    deadline = time.monotonic() + limit_s
    restore_at = 0.0
    seen = await admin.seen()
    while time.monotonic() < deadline:
        seen = await admin.seen()
        now = time.monotonic()
        if _is_well(seen):
            return
        if seen.instances:
            await _forget(cluster, admin, seen)
            grouped = any(i["mode"] in ("cooperative", "restoring") for i in _of(seen))
            if grouped and not seen.transition and now >= restore_at:
                await admin.call("POST", "/kunserve/restore?wait=false", {})
                restore_at = now + _RESTORE_EVERY_S
        await asyncio.sleep(_LOOK_S)
    raise RunError(f"the cluster is not as before after {limit_s:g} s: {_about(seen)}")


def all_there(seen: Seen) -> bool:
    """Whether all instances serve, and no transition is under way."""
    found = _of(seen)
    return (
        len(found) == TOTAL
        and not seen.transition
        and all(i["serving"] and not i.get("lost") for i in found)
    )


def _is_well(seen: Seen) -> bool:
    found = _of(seen)
    return (
        all_there(seen)
        and all(i["mode"] == "independent" for i in found)
        and not any(i["in_flight"] or i.get("running") or i.get("waiting") for i in found)
    )


async def _forget(cluster: FaultedCluster, admin: Admin, seen: Seen) -> None:
    """Take out the numbers of a host that was started anew: its instances have asked for others."""
    for number in sorted(cluster.abandoned):
        known = (seen.instances or {}).get(number)
        if known is None:
            cluster.abandoned.discard(number)
        elif known.get("lost"):
            await admin.call("DELETE", f"/workers/{number}")


def _of(seen: Seen) -> list[dict[str, object]]:
    return [dict(i) for i in (seen.instances or {}).values()]


def _about(seen: Seen) -> str:
    if seen.instances is None:
        return "the router does not answer"
    said = "; ".join(
        f"{n}: {i['mode']} {i.get('lost', '')} in flight {i['in_flight']}, "
        f"running {i.get('running')}, waiting {i.get('waiting')}"
        for n, i in seen.instances.items()
    )
    return f"{said}{'; a transition is under way' if seen.transition else ''}"

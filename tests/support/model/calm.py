"""When a modelled cluster has come to rest."""

from __future__ import annotations

from collections.abc import Mapping

from kunserve_sglang.control.control_plane import ControlPlane
from tests.support.model.member import ModelMember


def calm(plane: ControlPlane, members: Mapping[int, ModelMember]) -> bool:
    """Nobody waits, all agree, and the router knows."""
    known = plane.registry.instances
    statuses = {n: m.agent.status() for n, m in members.items()}
    return (
        plane.coordinator.running is None
        and len(statuses) == len(known)
        and all(m.at_rest for m in members.values())
        and all(
            (seen := known[n].status) is not None and seen.layout == status.layout
            for n, status in statuses.items()
            if n in known
        )
        and all(
            statuses[mate].layout == status.layout
            for status in statuses.values()
            for mate in status.layout.ids
            if mate in statuses
        )
        and all(mate in statuses for s in statuses.values() for mate in s.layout.ids)
    )


def picture(members: Mapping[int, ModelMember]) -> list[str]:
    """The members, for people."""
    return [
        f"{n}: {m.agent.status().mode} by {m.agent.status().layout.epoch} of "
        f"{m.agent.status().layout.ids}"
        for n, m in sorted(members.items())
    ]

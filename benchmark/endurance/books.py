"""Whether the books of the cluster balance: nothing that is counted may come or go. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Instances = Mapping[int, Mapping[str, Any]]


def imbalances(instances: Instances) -> list[str]:
    """What does not add up in one status, a line each."""
    found = []
    for number, instance in instances.items():
        pages, slots = instance.get("pages"), instance.get("slots")
        if pages and pages["parameters"] + pages["kv"] + pages["free"] != pages["total"]:
            found.append(f"instance {number} has not the pages of its budget: {pages}")
        if slots and (
            min(slots["used"], slots["cached"]) < 0
            or slots["used"] + slots["cached"] > slots["capacity"]
        ):
            found.append(f"instance {number} has more tokens than slots: {slots}")
    return found + _uncovered(instances)


def _uncovered(instances: Instances) -> list[str]:
    """Groups whose members, all of one epoch, do not have each layer once."""
    found = []
    groups = {tuple(i["group"]) for i in instances.values() if len(i.get("group", ())) > 1}
    for group in groups:
        members = [instances[n] for n in group if n in instances]
        settled = len(members) == len(group) and all(
            m["mode"] == "cooperative" and tuple(m["group"]) == group for m in members
        )
        if not settled or len({m["epoch"] for m in members}) > 1:
            continue  # in the middle of a change, which others watch
        layers = sorted(n for m in members for n in range(*m["layers"]))
        if layers != list(range(members[0]["layer_count"])):
            found.append(f"group {group} has layers {[m['layers'] for m in members]}")
    return found


def leftovers(instances: Instances) -> list[str]:
    """What is still held by a cluster that has nothing to do, a line each."""
    return [
        f"instance {number} still has {instance[name]} {name}"
        for number, instance in instances.items()
        for name in ("in_flight", "running", "waiting")
        if instance.get(name)
    ] + [
        f"instance {number} still uses {instance['slots']['used']} slots"
        for number, instance in instances.items()
        if instance.get("slots") and instance["slots"]["used"]
    ]

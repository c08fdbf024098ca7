"""Whether a member can take part in a transition: what it looks at before it votes."""

from __future__ import annotations

from collections.abc import Collection

from kunserve_sglang.core.layout import Layout, arriving_pages, layout_of, leaving_pages
from kunserve_sglang.core.messages import Transition
from kunserve_sglang.instance.parts.instance_parts import InstanceParts

_MANY_MAPPINGS = 8192
"""Neighbouring pages share a mapping, so more are not needed, however many pages there are."""


def objection(
    body: InstanceParts, layout: Layout, rejected: Collection[int], transition: Transition
) -> str:
    """Why the member that runs by `layout` cannot take part; empty if it can.

    Epochs that are `rejected` have been decided against. Cached prefixes that would not fit are
    evicted.
    """
    me = body.instance
    before = next((x for x in transition.before if me in x.ids), None)
    after = next((x for x in transition.after if me in x.ids), None)
    if before is None or after is None:
        return "the plan has no part for this instance"
    if transition.epoch <= layout.epoch:
        return f"epoch {transition.epoch} is not after {layout.epoch}"
    if transition.epoch in rejected:
        return f"epoch {transition.epoch} has been decided against"
    if before != layout:
        return f"the plan starts from another layout than epoch {layout.epoch}"
    if not after.covers(body.engine.layer_count):
        return "the plan does not hold every layer exactly once"
    return _does_not_fit(body, before, after, transition) or _too_narrow(body, before, after)


def _does_not_fit(
    body: InstanceParts, before: Layout, after: Layout, transition: Transition
) -> str:
    """The memory budget, checked with the functions that made the plan."""
    me, profile = body.instance, body.profile
    owners = len(after.members)
    if owners > profile.owners:
        return f"a group of {owners} is larger than {profile.owners}"
    beside = 0
    if transition.live:
        beside = leaving_pages(profile, me, before, after)
    if transition.ahead:
        beside = arriving_pages(profile, me, after, layout_of(transition.ahead, me))
    shares = [m.capacity for m in after.members]
    if any(profile.whole(slots) != slots for slots in shares):
        return f"{shares} slots are not whole blocks of {profile.block_slots}"
    if not profile.fits(after.member(me).layers, shares, beside=beside):
        return f"{shares} slots for {owners} owners do not fit the memory budget"
    dropped = before.member(me).layers.minus(after.member(me).layers)
    changing = body.pool.free + body.kv.pages + profile.parameter_pages(dropped)
    if body.pool.driver.mappable() < min(changing, _MANY_MAPPINGS):
        return "too few memory mappings are left to this process (raise vm.max_map_count)"
    return ""


def _too_narrow(body: InstanceParts, before: Layout, after: Layout) -> str:
    """Requests that run here need more slots than would be left.

    One that may need more than there are now, since it counts on those of others, needs no less.
    """
    capacity = after.member(body.instance).capacity
    body.engine.evict_cached(capacity)
    taken = len(body.engine.taken_slots())
    if taken > capacity:
        return f"requests hold {taken} slots, {capacity} would be left"
    largest = body.engine.largest_request()
    if largest > capacity and capacity < before.member(body.instance).capacity:
        return f"a request may need {largest} slots, {capacity} would be left"
    return ""

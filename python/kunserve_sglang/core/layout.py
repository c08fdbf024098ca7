"""The geometry of a group: who holds which layers, and how many slots fit.

Pure and shared by both planes: the planner proposes a `Layout` with these functions and every
member checks it with the very same ones, so the two sides cannot disagree on a capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from kunserve_sglang.core.bounds import Count, InstanceNumber, Size
from kunserve_sglang.core.errors import InternalError

_IDLE_PART = 16
"""An owner that needs no slots keeps its equal share divided by this."""


class LayerRange(msgspec.Struct, frozen=True, array_like=True, order=True, gc=False):
    """Decoder layers `[lo, hi)`."""

    lo: Count
    hi: Count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.lo, self.hi))

    def __len__(self) -> int:
        return self.hi - self.lo

    def __contains__(self, layer: int) -> bool:
        return self.lo <= layer < self.hi

    def within(self, other: LayerRange) -> bool:
        return other.lo <= self.lo and self.hi <= other.hi

    def common(self, other: LayerRange) -> LayerRange:
        """The layers that are in both; empty if there are none."""
        lo = max(self.lo, other.lo)
        return LayerRange(lo, max(lo, min(self.hi, other.hi)))

    def minus(self, other: LayerRange) -> list[int]:
        """Layers that are here and not in `other`, ascending."""
        return [layer for layer in self if layer not in other]


class Member(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One instance in a group. `capacity` is what it may use as an owner, in token slots."""

    instance: InstanceNumber
    layers: LayerRange
    capacity: Count
    address: str


class Layout(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A group and its stages, in pipeline order. A group of one is an independent instance."""

    epoch: Count
    members: tuple[Member, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(m.instance for m in self.members)

    @property
    def cooperative(self) -> bool:
        return len(self.members) > 1

    @property
    def placement(self) -> list[tuple[int, LayerRange]]:
        """Which layers are where, whatever the capacities."""
        return [(m.instance, m.layers) for m in self.members]

    def member(self, instance: int) -> Member:
        """Raises `KeyError` for an instance that is not in the group."""
        for m in self.members:
            if m.instance == instance:
                return m
        raise KeyError(instance)

    def position(self, instance: int) -> int:
        return self.ids.index(instance)

    def holder(self, layer: int) -> int:
        """The instance that holds `layer`; raises `KeyError` if nobody does."""
        for m in self.members:
            if layer in m.layers:
                return m.instance
        raise KeyError(layer)

    def covers(self, layer_count: int) -> bool:
        """Every layer exactly once, in pipeline order (invariant 2)."""
        edges = [0, *(m.layers.hi for m in self.members)]
        starts = [m.layers.lo for m in self.members]
        return (
            edges[:-1] == starts
            and edges[-1] == layer_count
            and all(len(m.layers) > 0 for m in self.members)
        )


class MemoryProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of one instance, as it reports it once at start. All sizes in bytes or pages.

    `pages` is the budget of the page pool; `layer_pages[l]` what the parameters of layer `l` take;
    `stride` the slots reserved (virtually) for each owner in a K or V buffer; `owners` how many
    owners such a buffer has room for, which is the largest group this instance can join.
    `block_slots` are handed out together (SGLang's `--page-size`): capacities are whole blocks.
    """

    page_bytes: Size
    pages: Count
    layer_pages: tuple[Count, ...]
    key_row_bytes: Size
    value_row_bytes: Size
    stride: Size
    owners: Size
    block_slots: Size = 1

    def whole(self, slots: int) -> int:
        """As many of these slots as make whole blocks."""
        return slots // self.block_slots * self.block_slots

    def kv_pages(self, slots: int) -> int:
        """Pages of one layer's K and V for `slots` token slots (plus the dummy block 0)."""
        rows = slots + self.block_slots
        return -(-rows * self.key_row_bytes // self.page_bytes) + -(
            -rows * self.value_row_bytes // self.page_bytes
        )

    def parameter_pages(self, layers: Iterable[int]) -> int:
        if isinstance(layers, LayerRange):
            return sum(self.layer_pages[layers.lo : layers.hi])
        return sum(self.layer_pages[layer] for layer in layers)

    def fits(self, layers: LayerRange, capacities: Iterable[int], *, beside: int = 0) -> bool:
        """Whether owners may have these `capacities` (slots each) while `layers` are held.

        `beside` are pages that are needed for something else at the same time.
        """
        budget = self.pages - self.parameter_pages(layers) - beside
        slots = list(capacities)
        return (
            max(slots) + self.block_slots <= self.stride
            and len(layers) * sum(self.kv_pages(count) for count in slots) <= budget
        )

    def capacity(self, layers: LayerRange, owners: int) -> int:
        """Slots that each of `owners` equal owners gets while `layers` are held; 0 if none fit."""
        budget = self.pages - self.parameter_pages(layers)
        return self.slots_within(budget // (owners * len(layers)))

    def slots_within(self, pages: int) -> int:
        """The most slots whose K and V of one layer take no more than `pages`; 0 if none fit.

        They are whole blocks.
        """
        # K and V share `pages` in one proportion that fits the most rows, and whole pages of K lie
        # just below or just above it.
        below = pages * self.key_row_bytes // (self.key_row_bytes + self.value_row_bytes)
        rows = max(self._rows(below, pages - below), self._rows(below + 1, pages - below - 1))
        return max(0, self.whole(min(rows, self.stride) - self.block_slots))

    def _rows(self, key_pages: int, value_pages: int) -> int:
        """Rows that have room for K in `key_pages` and for V in `value_pages`."""
        return min(
            key_pages * self.page_bytes // self.key_row_bytes,
            value_pages * self.page_bytes // self.value_row_bytes,
        )

    def idle_share(self, layers: LayerRange, owners: int) -> int:
        """Slots that an idle owner keeps, so that a new request can start at once."""
        return in_blocks(self.capacity(layers, owners) // _IDLE_PART, self.block_slots)

    def max_slots(self) -> int:
        """The most that one owner can ever get: nearly all of the largest group it can join."""
        count = len(self.layer_pages)
        full = LayerRange(0, count)
        widest = LayerRange(0, -(-count // self.owners))
        idle = [self.idle_share(widest, self.owners)] * (self.owners - 1)
        shared = largest(self.stride - 1, lambda slots: self.fits(widest, [slots, *idle]))
        return max(self.capacity(full, 1), self.whole(shared))


def in_blocks(slots: int, block_slots: int) -> int:
    """Slots of the blocks that hold so many."""
    return slots + -slots % block_slots


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number in `[0, limit]` that fits, if all below it fit too; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


class Move(msgspec.Struct, frozen=True, array_like=True):
    """The KV of `owner` in `layers` goes from instance `source` to instance `target`."""

    owner: int
    layers: LayerRange
    source: int
    target: int


def kv_moves(before: Sequence[Layout], after: Sequence[Layout]) -> list[Move]:
    """All KV that changes its holder, in layer order: the KV exchange of a transition."""
    old = {m.instance: layout for layout in before for m in layout.members}
    moves = []
    for layout in after:
        for member in layout.members:
            for source in old[member.instance].members:
                for target in layout.members:
                    layers = source.layers.common(target.layers)
                    if layers and source.instance != target.instance:
                        moves.append(
                            Move(member.instance, layers, source.instance, target.instance)
                        )
    return sorted(moves, key=lambda m: (m.layers, m.owner))


class ParameterLoad(msgspec.Struct, frozen=True, array_like=True):
    """Instance `target` needs the parameters of `layer`, which instance `source` holds."""

    layer: int
    source: int
    target: int


def parameter_loads(before: Sequence[Layout], after: Sequence[Layout]) -> list[ParameterLoad]:
    """Parameters that members must get back; sources take turns so that none does all the work."""
    held = {m.instance: m.layers for layout in before for m in layout.members}
    loads = []
    turns = dict.fromkeys(held, 0)
    for layout in after:
        for member in layout.members:
            for layer in member.layers.minus(held[member.instance]):
                source = min(
                    (i for i, layers in held.items() if layer in layers), key=lambda i: turns[i]
                )
                turns[source] += 1
                loads.append(ParameterLoad(layer, source, member.instance))
    return sorted(loads, key=lambda p: (p.layer, p.target))


def layout_of(layouts: tuple[Layout, ...], instance: int) -> Layout:
    """The layout that `instance` is in; raises `InternalError` if it is in none."""
    for layout in layouts:
        if instance in layout.ids:
            return layout
    raise InternalError(f"instance {instance} takes no part in the transition")


def leaving_pages(memory: MemoryProfile, me: int, before: Layout, after: Layout) -> int:
    """Pages of KV that stay mapped on `me`, until it has moved, in layers that are dropped."""
    gone = before.member(me).layers.minus(after.member(me).layers)
    return len(gone) * sum(memory.kv_pages(m.capacity) for m in before.members)


def arriving_pages(memory: MemoryProfile, me: int, now: Layout, then: Layout) -> int:
    """Pages for what `me` fetches ahead, to run `then` later, while it runs `now`."""
    coming = then.member(me).layers.minus(now.member(me).layers)
    slots = [now.member(owner).capacity for owner in then.ids]
    return memory.parameter_pages(coming) + len(coming) * sum(map(memory.kv_pages, slots))

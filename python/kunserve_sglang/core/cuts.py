"""Where to cut the layers among the members of a group (paper section 3.2).

Each member keeps a contiguous part of what it already holds, so a drop never loads a parameter. An
owner gets what the tightest stage has room for, so the cut that gives this stage the most is the
best; where several do, the stages are made as equally long as they can be.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate, pairwise

from kunserve_sglang.core.layout import LayerRange, MemoryProfile

_NO_KV = -1
"""Not even the dummy block, so that every cut has room for it."""


@lru_cache(maxsize=4096)
def best_cut(
    held: tuple[LayerRange, ...], memory: tuple[MemoryProfile, ...]
) -> tuple[tuple[LayerRange, ...], int]:
    """The ranges that members keep, and the token slots that each of them gets as an owner.

    `held[i]` is what member `i` holds now and `memory[i]` its budget; members are in the order of
    the middle of what they hold, and together hold every layer. Raises `ValueError` if there is no
    contiguous cut. Remembered, since plans of one cluster ask for the same again and again.
    """
    total = max(r.hi for r in held)
    stages = [_Stage(r, m, len(held)) for r, m in zip(held, memory, strict=True)]
    even = _place(stages, total, _NO_KV)
    if even is None:
        raise ValueError(f"no contiguous cut of {total} layers fits the ranges {list(held)}")
    best, slots = even, _tightest(stages, even)
    too_many = _bound(memory, total) + 1
    block = max(m.block_slots for m in memory)
    # Members that are alike are done after one look: nothing beats the even cut by even one block.
    looked_at = slots + block
    while looked_at < too_many:
        if better := _place(stages, total, looked_at):
            best, slots = better, _tightest(stages, better)
        else:
            # So is every number of slots that takes as many pages.
            too_many = max(m.slots_within(m.kv_pages(looked_at) - 1) for m in memory) + 1
        middle = (slots + too_many) // 2
        looked_at = max(slots + block, middle // block * block)
    return tuple(best), slots


def _bound(memory: Sequence[MemoryProfile], layers: int) -> int:
    """An upper bound: with more slots an owner, the members together would lack the memory."""
    nbytes = sum(m.pages * m.page_bytes for m in memory)
    least = min(min(m.layer_pages) * m.page_bytes for m in memory)
    row = min(m.key_row_bytes + m.value_row_bytes for m in memory)
    most = (nbytes // layers - least) // (len(memory) * row)
    return min(most, *(m.stride - 1 for m in memory))


class _Stage:
    """A member while its cut is looked for."""

    def __init__(self, held: LayerRange, memory: MemoryProfile, owners: int) -> None:
        self.held = held
        self.memory = memory
        self.owners = owners
        self._pages = _pages_below(memory.layer_pages)

    def capacity(self, layers: LayerRange) -> int:
        return self.memory.capacity(layers, self.owners)

    def first(self, end: int, slots: int) -> int:
        """The first layer from which `[first, end)` fits beside `slots` slots for each owner."""
        weight = self._weight(slots)
        return bisect_left(
            range(end + 1), weight(end) - self.memory.pages, lo=self.held.lo, key=weight
        )

    def last(self, start: int, slots: int) -> int:
        """The end up to which `[start, end)` fits beside `slots` slots for each owner."""
        weight = self._weight(slots)
        most = weight(start) + self.memory.pages
        return bisect_right(range(self.held.hi + 1), most, lo=start, key=weight) - 1

    def ends(self, start: int, slots: int) -> set[int]:
        """Where this stage may end if it begins at `start`."""
        return set(range(start + 1, self.last(start, slots) + 1))

    def _weight(self, slots: int) -> Callable[[int], int]:
        """Pages of parameters and KV in all layers below one."""
        each = 0 if slots == _NO_KV else self.owners * self.memory.kv_pages(slots)
        pages = self._pages
        return lambda layer: pages[layer] + layer * each


def _place(stages: Sequence[_Stage], total: int, slots: int) -> list[LayerRange] | None:
    """Cuts as even as they can be with room for `slots` slots an owner on every stage."""
    earliest = [0]  # a stage starts behind all others before it
    for stage in stages[1:]:
        earliest.append(max(stage.held.lo, earliest[-1] + 1))
    if earliest[-1] >= total:
        return None
    starts = [total]  # a stage starts so late that what is behind it fits
    for stage, start in zip(reversed(stages), reversed(earliest), strict=True):
        starts.append(max(start, stage.first(starts[-1], slots)))
    starts.reverse()
    if starts[0] != 0:
        return None
    ends = [total]  # a stage ends so early that those behind it get a layer each
    for stage in reversed(stages[:-1]):
        ends.append(min(stage.held.hi, ends[-1] - 1))
    ends.reverse()
    if any(len(set(stage.memory.layer_pages)) > 1 for stage in stages):
        return _place_uneven(stages, total, slots)
    cuts = [0]
    for i, stage in enumerate(stages):
        lowest = max(starts[i + 1], cuts[-1] + 1)
        highest = min(ends[i], stage.last(cuts[-1], slots))
        if lowest > highest:
            return None
        ideal = round(total * (i + 1) / len(stages))
        cuts.append(min(max(ideal, lowest), highest))
    return [LayerRange(lo, hi) for lo, hi in pairwise(cuts)]


def _place_uneven(stages: Sequence[_Stage], total: int, slots: int) -> list[LayerRange] | None:
    """As `_place`, for layers of different sizes: one of them alone may be too large for a stage.

    Where a stage may end is then no range of layers, so all ends are looked at.
    """
    ends: list[set[int]] = [{total}]
    for stage in reversed(stages[1:]):
        ends.append(
            {s for s in range(stage.held.lo, stage.held.hi) if stage.ends(s, slots) & ends[-1]}
        )
    ends.reverse()
    cuts = [0]
    for i, stage in enumerate(stages):
        possible = stage.ends(cuts[-1], slots) & ends[i] if cuts[-1] in stage.held else set()
        if not possible:
            return None
        ideal = round(total * (i + 1) / len(stages))
        cuts.append(min(possible, key=partial(_off, ideal)))
    return [LayerRange(lo, hi) for lo, hi in pairwise(cuts)]


def _off(ideal: int, end: int) -> tuple[int, int]:
    return abs(end - ideal), end


def _tightest(stages: Sequence[_Stage], ranges: Sequence[LayerRange]) -> int:
    return min(stage.capacity(r) for stage, r in zip(stages, ranges, strict=True))


@lru_cache(maxsize=256)
def _pages_below(layer_pages: tuple[int, ...]) -> tuple[int, ...]:
    """Pages of the parameters of all layers below each; one more than there are layers."""
    return tuple(accumulate(layer_pages, initial=0))

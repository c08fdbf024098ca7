"""Which captured graphs a stage needs for the decode steps of a group, and which one fits a batch.

A graph runs one range of layers for one number of requests. A smaller batch is padded with
dummy requests; a larger one, or one for other layers, runs without a graph.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from typing import Generic, TypeVar

from kunserve_sglang.core.cuts import best_cut
from kunserve_sglang.core.layout import LayerRange, MemoryProfile

GraphT = TypeVar("GraphT")

_FINE = (1, 2, 4)
_STEP = 8


def batch_sizes(most: int) -> tuple[int, ...]:
    """Numbers of requests to capture, ascending: a batch is never filled up to twice its size."""
    sizes = {*_FINE, *range(_STEP, most + 1, _STEP), most}
    return tuple(sorted(size for size in sizes if 0 < size <= most))


def first_drop_ranges(memory: MemoryProfile, members: int = 2) -> tuple[LayerRange, ...]:
    """The layer ranges that members may hold after the first drop of `members` equal instances.

    In the order of the pipeline. Empty where there are fewer layers than members.
    """
    whole = LayerRange(0, len(memory.layer_pages))
    if members < 2 or len(whole) < members:
        return ()
    ranges, _ = best_cut((whole,) * members, (memory,) * members)
    return ranges


class Captured(Generic[GraphT]):
    """Graphs by what they run."""

    def __init__(self) -> None:
        self._sizes: defaultdict[LayerRange, list[int]] = defaultdict(list)
        self._graphs: dict[tuple[LayerRange, int], GraphT] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def add(self, layers: LayerRange, size: int, graph: GraphT) -> None:
        """`graph` runs `layers` for `size` requests; it replaces one that does the same."""
        if (layers, size) not in self._graphs:
            insort(self._sizes[layers], size)
        self._graphs[layers, size] = graph

    def find(self, layers: LayerRange, requests: int) -> GraphT | None:
        """The smallest graph that takes `requests` requests through exactly these layers."""
        sizes = self._sizes.get(layers, [])
        place = bisect_left(sizes, requests)
        return self._graphs[layers, sizes[place]] if place < len(sizes) else None

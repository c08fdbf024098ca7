"""Which graphs are captured for stages, and which of them takes a batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.execution.stage_graphs import Captured, batch_sizes, first_drop_ranges
from kunserve_sglang.policy.planner import plan_drop
from kunserve_sglang.policy.state import ClusterState
from tests.support.clusters import alone, profile


@given(st.integers(1, 600))
def test_sizes_reach_the_largest_and_never_waste_half(most: int) -> None:
    sizes = batch_sizes(most)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
    for requests in range(1, most + 1):
        fitting = min(size for size in sizes if size >= requests)
        assert fitting < 2 * requests or requests == 1


def test_no_sizes_where_no_graphs_are_wanted() -> None:
    assert batch_sizes(0) == ()


def test_ranges_are_those_of_a_first_drop() -> None:
    """The planner's own words for two instances of this make."""
    for layers in (17, 24, 30):
        memory = profile(layers=layers)
        two = ClusterState(instances=(alone(0, memory=memory), alone(1, memory=memory)))
        plan = plan_drop(two, epoch=1, reason="", max_group_size=2)
        (group,) = plan.transition.after
        assert tuple(m.layers for m in group.members) == first_drop_ranges(memory)
    assert first_drop_ranges(profile(layers=1)) == ()
    assert len(first_drop_ranges(profile(), members=3)) == 3


@given(st.sets(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 50))
def test_the_smallest_graph_that_fits_is_found(sizes: set[int], requests: int) -> None:
    low, high = LayerRange(0, 4), LayerRange(4, 8)
    captured: Captured[tuple[LayerRange, int]] = Captured()
    for size in sizes:
        captured.add(low, size, (low, size))
        captured.add(low, size, (low, size))
    assert len(captured) == len(sizes)
    fitting = [size for size in sizes if size >= requests]
    assert captured.find(low, requests) == ((low, min(fitting)) if fitting else None)
    assert captured.find(high, requests) is None
    assert captured.find(LayerRange(0, 3), requests) is None

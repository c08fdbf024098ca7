"""The system refuses to map pages in the middle of transitions: nobody ends, no page is lost.

Real schedulers in processes of their own, in which system calls fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kunserve_sglang.core.messages import Mode, TransitionKind
from kunserve_sglang.policy.transition_request import Outcome
from tests.support.cluster import ScriptedCluster
from tests.support.identity import PAIR_GATES, differences, play_both, small_cluster
from tests.support.schedules import random_scripts

ALWAYS = 1
KNOWN_BEFORE = -1


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedCluster]:
    with small_cluster(tmp_path_factory.mktemp("refused"), 2, tiny_model) as cluster:
        yield cluster


def _pages_are_conserved(cluster: ScriptedCluster) -> None:
    for instance in cluster.status():
        pages = instance["pages"]
        assert pages["parameters"] + pages["kv"] + pages["free"] == pages["total"]


@pytest.mark.parametrize("every", [41, 67, 97])
def test_two_cycles_in_which_every_kth_mapping_fails(pair: ScriptedCluster, every: int) -> None:
    for member in (0, 1):
        pair.refuse_mappings(member, every)
    try:
        events, found = play_both(pair, random_scripts(800 + every, 2, PAIR_GATES))
    finally:
        refused = [pair.refuse_mappings(member, 0) for member in (0, 1)]
    assert found == []
    assert len(events) >= 2
    assert min(refused) > 0
    _pages_are_conserved(pair)
    events, found = play_both(pair, random_scripts(801 + every, 2, PAIR_GATES))
    assert found == []
    assert events[-1].capacity_after == sum(pair.capacities)


def test_two_cycles_in_which_every_kth_call_of_a_gpu_fails(pair_on_a_gpu: ScriptedCluster) -> None:
    for member in (0, 1):
        pair_on_a_gpu.refuse_mappings(member, 97)
    try:
        events, found = play_both(pair_on_a_gpu, random_scripts(850, 2, PAIR_GATES))
    finally:
        refused = [pair_on_a_gpu.refuse_mappings(member, 0) for member in (0, 1)]
    assert found == []
    assert len(events) >= 2
    assert min(refused) > 0
    _pages_are_conserved(pair_on_a_gpu)


def test_a_member_without_mappings_left_votes_against_a_drop(pair: ScriptedCluster) -> None:
    scripts = random_scripts(870, 2, ())
    expected = pair.play(scripts)
    pair.refuse_mappings(1, KNOWN_BEFORE)
    try:
        event = pair.transition(TransitionKind.DROP)
    finally:
        pair.refuse_mappings(1, 0)
    assert event.status is Outcome.ABORTED
    assert "vm.max_map_count" in event.error
    pair.wait_for_modes({Mode.INDEPENDENT})
    assert differences(expected, pair.play(scripts)) == []


def test_a_member_that_cannot_map_anything_recovers_when_it_can(pair: ScriptedCluster) -> None:
    """The other has passed the barrier: the group comes apart, and both are alone again."""
    scripts = random_scripts(860, 2, ())
    expected = pair.play(scripts)
    pair.refuse_mappings(1, ALWAYS)
    try:
        event = pair.transition(TransitionKind.DROP)
        assert event.status is not Outcome.COMMITTED
        assert "map" in event.error
        pair.wait_until(lambda now: now[1]["mode"] == Mode.RECOVERING)
    finally:
        assert pair.refuse_mappings(1, 0) > 0
    pair.wait_for_modes({Mode.INDEPENDENT})
    _pages_are_conserved(pair)
    assert [i["slots"]["capacity"] for i in pair.status()] == pair.capacities
    assert differences(expected, pair.play(scripts)) == []
    assert pair.transition(TransitionKind.DROP).status is Outcome.COMMITTED
    assert differences(expected, pair.play(scripts)) == []
    assert pair.transition(TransitionKind.RESTORE).status is Outcome.COMMITTED

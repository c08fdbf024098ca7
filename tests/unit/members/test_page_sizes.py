"""Slots that SGLang hands out in blocks (`--page-size`): tokens do not change with transitions.

Prefixes are cached and memory is short, so that requests are retracted and blocks are compacted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kunserve_sglang.core.messages import Mode, TransitionKind
from kunserve_sglang.policy.transition_request import Outcome
from tests.support.cluster import ScriptedCluster
from tests.support.controlled import READY_S
from tests.support.greedy_reference import greedy
from tests.support.identity import (
    PAIR_GATES,
    differences,
    play_both,
    play_into_a_drop,
    small_cluster,
)
from tests.support.schedules import Script, random_scripts, request
from tests.support.script import Add

SIZES = (16, 64)
SEEDS = range(700, 706)


@dataclass
class Paged:
    """Members with blocks of `size` slots, and the seeds that they have played."""

    size: int
    cluster: ScriptedCluster
    played: set[int]


@pytest.fixture(scope="module", params=SIZES)
def paged(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Paged]:
    """The smaller blocks with overlap scheduling, the larger ones without."""
    folder = tmp_path_factory.mktemp(f"blocks-of-{request.param}")
    serial = request.param == max(SIZES)
    with small_cluster(
        folder, 2, tiny_model, page_size=request.param, disable_overlap_schedule=serial
    ) as cluster:
        yield Paged(request.param, cluster, set())


@pytest.mark.parametrize("seed", SEEDS)
def test_two_cycles_in_a_random_schedule(paged: Paged, seed: int) -> None:
    paged.played.add(seed)
    scripts = random_scripts(seed, 2, PAIR_GATES)
    events, amiss = play_both(paged.cluster, scripts, standing=seed % 3 == 0)
    assert amiss == []
    assert len(events) >= 2
    assert events[0].capacity_after > events[0].capacity_before
    assert events[-1].capacity_after == events[0].capacity_before
    assert all(e.capacity_after % paged.size == 0 for e in events)


def test_answers_are_those_of_the_model(paged: Paged, tiny_model: Path) -> None:
    """By transformers, in which nobody hands out slots; prefixes are used again meanwhile."""
    scripts = random_scripts(SEEDS[0], 2, PAIR_GATES)
    cached = 0
    for script, got in zip(scripts, paged.cluster.play(scripts), strict=True):
        for _, action in script:
            if isinstance(action, Add) and got[action.rid].reason != "abort":
                tokens = got[action.rid].tokens
                expected = greedy(tiny_model, action.prompt, action.new_tokens)
                assert tokens == expected
                cached += got[action.rid].cached
                assert got[action.rid].cached % paged.size == 0
    assert cached > 0


def test_running_requests_take_begun_blocks_along(paged: Paged) -> None:
    """A drop in mid-decode of which no piece moves by itself.

    Where a block is half full, the next token is written behind rows that follow later.
    """
    scripts = random_scripts(SEEDS[1], 2, ())
    expected = paged.cluster.play(scripts)
    with paged.cluster.pieces_held():
        got, dropping = play_into_a_drop(paged.cluster, scripts, 9)
        assert all(i["mode"] == Mode.COOPERATIVE for i in paged.cluster.status())
    assert dropping.result(READY_S).status is Outcome.COMMITTED
    assert differences(expected, got) == []
    assert paged.cluster.transition(TransitionKind.RESTORE).status is Outcome.COMMITTED


def test_whoever_is_retracted_goes_on(paged: Paged, tiny_model: Path) -> None:
    """More requests than there are blocks for, with layers here and elsewhere."""
    rng = random.Random(7)
    script: Script = [(0, request(rng, f"r{i}", 20, 70)) for i in range(12)]
    scripts = [script, script]
    expected = {
        add.rid: greedy(tiny_model, add.prompt, add.new_tokens)
        for _, add in script
        if isinstance(add, Add)
    }
    for kind in (TransitionKind.DROP, TransitionKind.RESTORE):
        before = sum(paged.cluster.numbers(member)[1] for member in (0, 1))
        for got in paged.cluster.play(scripts):
            assert {rid: output.tokens for rid, output in got.items()} == expected
        assert sum(paged.cluster.numbers(member)[1] for member in (0, 1)) > before
        assert paged.cluster.transition(kind).status is Outcome.COMMITTED


def test_blocks_follow_the_load_of_one_owner(paged: Paged, tiny_model: Path) -> None:
    """All load on one owner of a group, which gets nearly all slots there are."""
    cluster = paged.cluster
    assert cluster.transition(TransitionKind.DROP).status is Outcome.COMMITTED
    equal = cluster.status()[0]["slots"]["capacity"]
    rng = random.Random(9)
    busy: Script = [(0, request(rng, f"small{i}", 60, 30)) for i in range(12)]
    busy += [(5, request(rng, "large", 200, equal - 150))]
    got, _ = cluster.play([busy, []])
    for _, add in busy:
        assert isinstance(add, Add)
        assert got[add.rid].tokens == greedy(tiny_model, add.prompt, add.new_tokens)
    capacities = [i["slots"]["capacity"] for i in cluster.status()]
    assert capacities[0] > 1.4 * equal
    assert all(capacity % paged.size == 0 for capacity in capacities)
    cluster.wait_until(lambda instances: all(i["slots"]["used"] == 0 for i in instances))
    assert cluster.transition(TransitionKind.RESTORE).status is Outcome.COMMITTED
    assert [i["slots"]["capacity"] for i in cluster.status()] == cluster.capacities


def test_a_survivor_goes_on_alone(tiny_model: Path, tmp_path: Path) -> None:
    scripts = random_scripts(SEEDS[2], 2, ())
    with small_cluster(tmp_path, 2, tiny_model, page_size=SIZES[0]) as cluster:
        expected = cluster.play(scripts)
        assert cluster.transition(TransitionKind.DROP).status is Outcome.COMMITTED
        cluster.kill(1)
        cluster.wait_until(lambda now: now[0]["mode"] == Mode.INDEPENDENT)
        got = cluster.play(scripts)
    assert differences(expected[:1], got[:1]) == []


def test_pressure_was_real(paged: Paged) -> None:
    if missing := set(SEEDS) - paged.played:
        pytest.skip(f"{len(missing)} of {len(SEEDS)} schedules were not played in this session")
    cluster = paged.cluster
    numbers = [cluster.numbers(member) for member in (0, 1)]
    assert max(slot for slot, _ in numbers) > cluster.capacities[0] + paged.size
    events = cluster.control.plane.events.latest()
    assert sum(e.compacted_slots for e in events) > 0
    assert sum(e.exchanged_bytes for e in events) > 0

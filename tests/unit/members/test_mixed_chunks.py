"""Prefills that take decode steps along (`--enable-mixed-chunk`): at rest in a group, then back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.transition_request import Outcome
from tests.support.cluster import ScriptedCluster
from tests.support.greedy_reference import greedy
from tests.support.identity import PAIR_GATES, play_both, same, small_cluster
from tests.support.schedules import Script, random_scripts, request
from tests.support.script import Add, Break
from tests.unit.members.test_penalties import check, penalized

SEEDS = range(800, 806)


@pytest.fixture(
    scope="module",
    params=[(True, 1), (False, 1), (False, 16)],
    ids=["serial", "overlapped", "overlapped in blocks"],
)
def mixing(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScriptedCluster]:
    serial, page_size = request.param
    with small_cluster(
        tmp_path_factory.mktemp("mixing"),
        2,
        tiny_model,
        enable_mixed_chunk=True,
        disable_overlap_schedule=serial,
        page_size=page_size,
    ) as cluster:
        yield cluster


def mixed(cluster: ScriptedCluster) -> tuple[int, int]:
    """Steps of both members, independent and cooperative."""
    alone, together = zip(*(cluster.mixed(member) for member in (0, 1)), strict=True)
    return sum(alone), sum(together)


@pytest.mark.parametrize("seed", SEEDS)
def test_two_cycles_in_a_random_schedule(mixing: ScriptedCluster, seed: int) -> None:
    events, amiss = play_both(mixing, random_scripts(seed, 2, PAIR_GATES), standing=seed % 3 == 0)
    assert amiss == []
    assert len(events) >= 2


def test_it_rests_in_a_group_and_is_back_after_a_restore(
    mixing: ScriptedCluster, tiny_model: Path
) -> None:
    """Answers are those of transformers, which know no scheduler."""
    scripts = random_scripts(SEEDS[0], 2, PAIR_GATES)
    adds = [[a for _, a in script if isinstance(a, Add)] for script in scripts]
    expected = [
        {add.rid: greedy(tiny_model, add.prompt, add.new_tokens) for add in of_member}
        for of_member in adds
    ]
    grown = []
    for kind in (TransitionKind.DROP, TransitionKind.RESTORE, None):
        before = mixed(mixing)
        for want, got in zip(expected, mixing.play(scripts), strict=True):
            whole = {rid: out.tokens for rid, out in got.items() if out.reason != "abort"}
            assert whole == {rid: want[rid] for rid in whole}
        after = mixed(mixing)
        grown.append((after[0] - before[0], after[1] - before[1]))
        if kind is not None:
            assert mixing.transition(kind).status is Outcome.COMMITTED
    assert grown[0][0] > 0
    assert grown[1] == (0, 0)
    assert grown[2] == grown[0]


def test_penalties_count_every_token(mixing: ScriptedCluster, tiny_model: Path) -> None:
    """Who decodes with penalties, and who has none, before, in and after a group."""
    script = penalized(1)
    for kind in (TransitionKind.DROP, TransitionKind.RESTORE, None):
        got, _ = mixing.play([script, []])
        check(script, tiny_model, got)
        if kind is not None:
            assert mixing.transition(kind).status is Outcome.COMMITTED


@pytest.mark.parametrize("point", ["step prepared", "layers and sampling"])
def test_the_others_go_on_where_one_fails(mixing: ScriptedCluster, point: str) -> None:
    """It decodes along with prompts of others, or they with its own."""
    rng = random.Random(12)
    good: Script = [
        (0, request(rng, "decodes", 30, 40)),
        (4, request(rng, "in chunks", 150, 20)),
        (9, request(rng, "later", 12, 10)),
    ]
    expected, _ = mixing.play([good, []])
    bad: Script = [(3, request(rng, "bad", 25, 30)), (5, Break(point, "bad"))]
    got, _ = mixing.play([sorted([*good, *bad], key=lambda entry: entry[0]), []])
    assert got.pop("bad").reason == "failed"
    assert all(same(expected[rid], got[rid]) for rid in expected)

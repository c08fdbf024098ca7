"""One bad request ends one request: whatever fails with it, the others notice nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import ScriptedCluster
from tests.support.faults import POINTS
from tests.support.identity import same, small_cluster
from tests.support.schedules import Script, request
from tests.support.script import Break


@pytest.mark.parametrize("cooperating", [False, True], ids=["independent", "cooperative"])
@pytest.mark.parametrize("point", sorted(POINTS.keys() - {"layers of a peer"}))
def test_the_others_go_on(pair: ScriptedCluster, point: str, cooperating: bool) -> None:
    rng = random.Random(3)
    good: Script = [
        (0, request(rng, "first", 30, 40)),
        (1, replace(request(rng, "penalized", 20, 40), sampling={"frequency_penalty": 0.8})),
        (2, request(rng, "in chunks", 150, 30)),
        (9, request(rng, "later", 12, 10)),
    ]
    peer: Script = [(0, request(rng, "of the peer", 25, 30))]
    expected = pair.play([good, peer])
    bad = (3, request(rng, "bad", 25, 30))
    script = sorted([*good, bad, (3, Break(point, "bad"))], key=lambda entry: entry[0])
    # It breaks before it has come.
    script.sort(key=lambda entry: (entry[0], not isinstance(entry[1], Break)))
    with pair.dropped() if cooperating else nullcontext():
        got = pair.play([script, peer])
    assert got[0].pop("bad").reason == "failed"
    for want, have in zip(expected, got, strict=True):
        assert want.keys() == have.keys()
        assert all(same(want[rid], have[rid]) for rid in want), (want, have)


@pytest.fixture(scope="module")
def reading(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScriptedCluster]:
    """Members that have a tokenizer, so that grammars work; they overlap steps."""
    folder = tmp_path_factory.mktemp("reading")
    with small_cluster(
        folder, 2, tiny_model, skip_tokenizer_init=False, disable_overlap_schedule=False
    ) as cluster:
        yield cluster


@pytest.mark.parametrize("cooperating", [False, True], ids=["independent", "cooperative"])
def test_a_grammar_that_leaves_nothing_to_sample(
    reading: ScriptedCluster, cooperating: bool
) -> None:
    """With grammars SGLang samples late, when the step before has been applied."""
    rng = random.Random(6)
    bound: Any = {"sampling": {"regex": "[a-z]{20,40}"}}
    good: Script = [
        (0, request(rng, "free", 30, 40)),
        (0, replace(request(rng, "bound", 20, 30), **bound)),
    ]
    peer: Script = [(0, request(rng, "of the peer", 25, 30))]
    expected = reading.play([good, peer])
    bad = (3, replace(request(rng, "bad", 25, 30), **bound))
    script = [*good, (2, Break("sampling", "bad")), bad]
    with reading.dropped() if cooperating else nullcontext():
        got = reading.play([script, peer])
    assert got[0].pop("bad").reason == "failed"
    for want, have in zip(expected, got, strict=True):
        assert all(same(want[rid], have[rid]) for rid in want), (want, have)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_cannot_run_it(pair: ScriptedCluster, stage: int) -> None:
    """The first stage of the pipeline or the last one; its owner ends it, and the group goes on."""
    rng = random.Random(5)
    good: Script = [(0, request(rng, f"good{i}", 30, 40)) for i in range(3)]
    peer: Script = [(0, request(rng, "of the peer", 25, 30))]
    expected = pair.play([good, peer])
    scripts: list[Script] = [[], []]
    scripts[stage] = [(0, Break("layers of a peer", "300")), *peer]
    scripts[1 - stage] = [*good, (2, request(rng, "bad", 300, 5))]
    with pair.dropped():
        got = pair.play(scripts)
    assert got[1 - stage].pop("bad").reason == "failed"
    assert all(same(expected[0][rid], got[1 - stage][rid]) for rid in expected[0])
    assert all(same(expected[1][rid], got[stage][rid]) for rid in expected[1])


def test_a_request_that_breaks_in_mid_answer(pair: ScriptedCluster) -> None:
    """It has produced tokens, which its client has."""
    rng = random.Random(4)
    good: Script = [(0, request(rng, "good", 30, 40))]
    expected, _ = pair.play([good, []])
    broken: Script = [(0, request(rng, "bad", 25, 40)), (12, Break("end looked for", "bad"))]
    got, _ = pair.play([[*good, *broken], []])
    assert got["bad"].reason == "failed"
    assert 0 < len(got["bad"].tokens) < 40
    assert same(expected["good"], got["good"])


def test_whoever_has_just_been_launched_is_kept(pair: ScriptedCluster) -> None:
    """With overlap scheduling a result fails when the next step, of others, is under way."""
    rng = random.Random(9)
    good: Script = [(1, request(rng, "launched", 30, 20)), (1, request(rng, "too", 20, 20))]
    expected, _ = pair.play([good, []])
    bad: Script = [(0, Break("end looked for", "bad")), (0, request(rng, "bad", 25, 5))]
    got, _ = pair.play([[*bad, *good], []])
    assert got.pop("bad").reason == "failed"
    assert all(same(expected[rid], got[rid]) for rid in expected)

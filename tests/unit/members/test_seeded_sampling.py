"""Answers that are drawn by seeds are those of an undisturbed run, token for token.

What is drawn follows from the seed of a request and the place of a token in it, and from nothing
else: neither from who else is in its batch, nor from who computes it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kunserve_sglang.core.resumption import reports_error
from kunserve_sglang.policy.transition_request import Outcome
from tests.support.calls import calling_scripts
from tests.support.cluster import ScriptedCluster
from tests.support.identity import alike, play_both, small_cluster
from tests.support.left_streams import all_streams, events_by_choice, events_of, left_after, told
from tests.support.schedules import Script
from tests.support.script import Call

SEEDS = range(2)


@pytest.fixture(scope="module")
def drawing(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScriptedCluster]:
    """Two instances that heed seeds."""
    with small_cluster(
        tmp_path_factory.mktemp("drawing"),
        2,
        tiny_model,
        skip_tokenizer_init=False,
        heeds_seeds=True,
    ) as cluster:
        yield cluster


def drawn(seed: int) -> list[Script]:
    """The calls of `calling_scripts`, none of them greedy; of odd ones, not all tokens may come.

    SGLang ties what it draws to tokens where all may come in a whole batch, and else to their ranks
    by probability, so that answers of a mixed batch depend on who is in it.
    """
    rng = random.Random(seed)
    scripts = calling_scripts(seed)
    for _, action in (entry for script in scripts for entry in script):
        if isinstance(action, Call):
            generates = action.endpoint == "generate"
            told = action.body["sampling_params"] if generates else action.body
            told["temperature"] = rng.uniform(0.5, 1.5)
            told["sampling_seed" if generates else "seed"] = rng.randrange(1 << 31)
            if seed % 2:
                told["top_p"], told["top_k"] = rng.uniform(0.5, 0.99), rng.randrange(2, 50)
    return scripts


def test_it_is_the_seed_that_decides(drawing: ScriptedCluster) -> None:
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 20, "ignore_eos": True}}
    script: Script = []
    for name, seed in (("one", 1), ("other", 2), ("one again", 1)):
        params = {**body["sampling_params"], "temperature": 1.0, "sampling_seed": seed}
        script.append((0, Call(name, "generate", {**body, "sampling_params": params})))
    answers, _ = drawing.play([script, []])
    texts = {name: answer.received[-1][-1]["output_ids"] for name, answer in answers.items()}
    assert all(len(tokens) == 20 for tokens in texts.values())
    assert texts["one"] == texts["one again"] != texts["other"]


@pytest.mark.parametrize("seed", SEEDS, ids=lambda s: f"seed-{s}")
def test_across_transitions(drawing: ScriptedCluster, seed: int) -> None:
    events, amiss = play_both(drawing, drawn(seed))
    assert amiss == []
    assert [e for e in events if e.status is Outcome.COMMITTED]


@pytest.mark.parametrize("seed", SEEDS, ids=lambda s: f"seed-{s}")
def test_a_stream_that_another_goes_on_with(drawing: ScriptedCluster, seed: int) -> None:
    rng = random.Random(seed)
    scripts = [all_streams(script) for script in drawn(seed)]
    played = [events_of(output) for output in drawing.play(scripts)]
    left = [{rid: rng.randrange(1, len(e)) for rid, e in p.items() if e} for p in played]
    assert sum(map(len, left)) > 5
    assert not [data for p in played for e in p.values() for _, data in e if reports_error(data)]
    again = drawing.play(
        [left_after(s, p, c) for s, p, c in zip(scripts, played, left, strict=True)]
    )
    for script, whole, counts, output in zip(scripts, played, left, again, strict=True):
        rest = events_of(output)
        for rid, count in counts.items():
            got = [*whole[rid][:count], *rest[rid]]
            wanted, had = events_by_choice(whole[rid]), events_by_choice(got)
            assert alike(wanted, had), f"{told(script, rid, count)}\n{wanted}\n{had}"

"""Logprobs are the same in both modes and across transitions, however a prompt is cut."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import ScriptedCluster
from tests.support.identity import PAIR_GATES, differences, play_both, small_cluster
from tests.support.schedules import Script, random_scripts, random_tokens
from tests.support.script import Add

ASKS: list[dict[str, Any]] = [
    {"return_logprob": True},
    {"return_logprob": True, "logprob_start_len": 0},
    {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3},
    {"return_logprob": True, "logprob_start_len": 100, "top_logprobs_num": 1},
    {"return_logprob": True, "logprob_start_len": 0, "token_ids_logprob": [5, 7]},
    {},
]


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedCluster]:
    with small_cluster(tmp_path_factory.mktemp("pair"), 2, tiny_model) as cluster:
        yield cluster


@pytest.mark.parametrize("asks", ASKS[:-1], ids=str)
def test_a_prompt_of_several_chunks(pair: ScriptedCluster, asks: dict[str, Any]) -> None:
    """Several of them are in flight at once while the layers are elsewhere."""
    prompt = random_tokens(random.Random(1), 300)
    script: Script = [(0, Add("long", prompt, 6, asks=asks))]
    expected = pair.play([script, []])
    with pair.dropped():
        got = pair.play([script, []])
    assert differences(expected, got) == []
    record = got[0]["long"].logprobs
    assert len(record["output_token_logprobs_val"]) == 6
    asked = max(0, len(prompt) - asks.get("logprob_start_len", len(prompt)))
    assert len(record["input_token_logprobs_val"]) == asked


@pytest.mark.parametrize("seed", range(800, 804), ids=lambda s: f"seed-{s}")
def test_two_cycles(pair: ScriptedCluster, seed: int) -> None:
    rng = random.Random(seed)
    scripts = [_asking(rng, script) for script in random_scripts(seed, 2, PAIR_GATES)]
    events, differences = play_both(pair, scripts)
    assert differences == []
    assert len(events) >= 2


def _asking(rng: random.Random, script: Script) -> Script:
    return [
        (step, replace(action, asks=rng.choice(ASKS)) if isinstance(action, Add) else action)
        for step, action in script
    ]

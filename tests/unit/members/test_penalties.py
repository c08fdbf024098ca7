"""Greedy answers with penalties equal a reference that is computed apart from SGLang."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from kunserve_sglang.policy.transition_request import Outcome
from tests.support.cluster import ScriptedCluster
from tests.support.controlled import READY_S
from tests.support.greedy_reference import greedy
from tests.support.identity import play_into_a_drop
from tests.support.schedules import Script, random_tokens
from tests.support.script import Add, Output, Pause

PENALTIES: list[dict[str, Any]] = [
    {"frequency_penalty": 1.5},
    {"presence_penalty": 1.2},
    {"repetition_penalty": 1.4},
    {"frequency_penalty": 0.7, "presence_penalty": 0.4, "repetition_penalty": 1.2},
    {"frequency_penalty": -1.0},
    {},
]
"""One request each; the last is one without, among others that have some."""


def penalized(seed: int, count: int = 40) -> Script:
    """All penalties at once, prompts of one chunk and of several, arriving one by one."""
    rng = random.Random(seed)
    prompts = [random_tokens(rng, rng.choice((4, 30, 150))) for _ in PENALTIES]
    return [
        (i, Add(f"r{i}", prompt, count + i, penalties))
        for i, (prompt, penalties) in enumerate(zip(prompts, PENALTIES, strict=True))
    ]


def check(script: Script, model: Path, got: dict[str, Output]) -> None:
    for _, add in script:
        if isinstance(add, Add):
            expected = greedy(model, add.prompt, add.new_tokens, **add.sampling)
            assert got[add.rid].tokens == expected, add.sampling


def test_the_reference_shows_each_penalty(tiny_model: Path) -> None:
    """The comparisons below would prove little if answers were the same without."""
    shown = [False] * len(PENALTIES)
    for seed in range(1, 7):
        for i, (_, add) in enumerate(penalized(seed)):
            assert isinstance(add, Add)
            plain = greedy(tiny_model, add.prompt, add.new_tokens)
            shown[i] |= plain != greedy(tiny_model, add.prompt, add.new_tokens, **add.sampling)
    assert shown == [bool(penalties) for penalties in PENALTIES]


def test_in_independent_mode(pair: ScriptedCluster, tiny_model: Path) -> None:
    script = penalized(1)
    got, _ = pair.play([script, []])
    check(script, tiny_model, got)


def test_in_cooperative_mode(pair: ScriptedCluster, tiny_model: Path) -> None:
    scripts = [penalized(2), penalized(3)]
    with pair.dropped():
        answers = pair.play(scripts)
    for script, got in zip(scripts, answers, strict=True):
        check(script, tiny_model, got)


def test_across_a_drop(pair: ScriptedCluster, tiny_model: Path) -> None:
    scripts = [penalized(4), penalized(5)]
    answers, dropping = play_into_a_drop(pair, scripts, 20)
    assert dropping.result(READY_S).status is Outcome.COMMITTED
    pair.restore_when_idle()
    for script, got in zip(scripts, answers, strict=True):
        check(script, tiny_model, got)


@pytest.mark.parametrize("cooperating", [False, True])
def test_requests_that_were_retracted(
    pair: ScriptedCluster, tiny_model: Path, cooperating: bool
) -> None:
    """They are computed again from their prompt and all that they have produced."""
    script = penalized(6)
    before = pair.numbers(0)[1]
    with pair.dropped() if cooperating else nullcontext():
        got, _ = pair.play([[*script, (12, Pause("retract")), (25, Pause("retract"))], []])
    assert pair.numbers(0)[1] > before
    check(script, tiny_model, got)

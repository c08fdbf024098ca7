"""The comparison of answers would notice: faults that once were there, or could be, are planted.

The requests are those of `test_all_that_requests_ask_for`, by the same seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.calls import calling_scripts
from tests.support.cluster import ScriptedCluster
from tests.support.faults import PLANTED
from tests.support.identity import differences, play_across, small_cluster
from tests.support.script import Call, Output, Plant

MAX_SEEDS = 6
"""A fault has to be found in as many schedules, of some 20 calls each."""


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedCluster]:
    folder = tmp_path_factory.mktemp("planted")
    with small_cluster(folder, 2, tiny_model, skip_tokenizer_init=False) as cluster:
        yield cluster


@pytest.mark.parametrize("fault", PLANTED)
def test_it_is_found(pair: ScriptedCluster, fault: str) -> None:
    calls = 0
    for seed in range(MAX_SEEDS):
        scripts = calling_scripts(seed)
        calls += sum(isinstance(action, Call) for script in scripts for _, action in script)
        expected, before = _undisturbed(pair, seed), pair.failures()
        _, got = play_across(pair, [[(0, Plant(fault)), *script] for script in scripts])
        if differences(expected, got) or pair.failures() > before:
            return
    pytest.fail(f"{fault}: not found in {calls} calls")


@cache
def _undisturbed(pair: ScriptedCluster, seed: int) -> list[dict[str, Output]]:
    return pair.play(calling_scripts(seed))

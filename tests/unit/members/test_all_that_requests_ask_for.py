"""Whatever a request asks for, its answer is the same in both modes and across transitions.

A failing seed is replayed with `pytest -k 'seed-7'`; more of them are tried with
`KUNSERVE_REQUESTS=20000 pytest tests/unit/members/test_all_that_requests_ask_for.py`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import asks
from tests.support.cluster import ScriptedCluster
from tests.support.identity import PAIR_GATES, play_both, small_cluster
from tests.support.member import Add
from tests.support.schedules import Script, random_scripts

REQUESTS = int(os.environ.get("KUNSERVE_REQUESTS", "60"))
PER_SCHEDULE = 20
FIRST = int(os.environ.get("KUNSERVE_FIRST_SEED", "0"))
SEEDS = range(FIRST, FIRST + -(-REQUESTS // PER_SCHEDULE))


@pytest.fixture(scope="module", params=["serial", "overlapped"])
def pair(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScriptedCluster]:
    folder = tmp_path_factory.mktemp(request.param)
    with small_cluster(
        folder,
        2,
        tiny_model,
        skip_tokenizer_init=False,
        disable_overlap_schedule=request.param == "serial",
    ) as cluster:
        yield cluster


def test_every_field_is_drawn_or_left_out_for_a_reason() -> None:
    assert asks.unlisted() == set()


@pytest.mark.parametrize("seed", SEEDS, ids=lambda s: f"seed-{s}")
def test_equal_answers(pair: ScriptedCluster, seed: int) -> None:
    rng = random.Random(seed)
    scripts = [_asking(rng, script) for script in random_scripts(seed, 2, PAIR_GATES)]
    _, differences = play_both(pair, scripts, standing=seed % 4 == 0)
    assert differences == []


def _asking(rng: random.Random, script: Script) -> Script:
    asking: Script = []
    for step, action in script:
        if isinstance(action, Add):
            sampling, fields = asks.draw(rng, len(action.prompt))
            action = replace(action, sampling=sampling, asks=fields)
        asking.append((step, action))
    return asking

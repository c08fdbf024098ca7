"""What is larger than the instance waits for a drop; it holds up nobody, and leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kunserve_sglang.api.events import Outcome
from kunserve_sglang.core.messages import TransitionKind
from tests.support.cluster import ScriptedCluster
from tests.support.identity import small_cluster
from tests.support.member import AbortRequest, Gate, Turns
from tests.support.schedules import Script, request


@pytest.fixture(scope="module", params=["serial", "overlapped"])
def pair(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScriptedCluster]:
    folder = tmp_path_factory.mktemp(request.param)
    serial = request.param == "serial"
    with small_cluster(folder, 2, tiny_model, disable_overlap_schedule=serial) as cluster:
        yield cluster


def test_others_are_served_while_it_waits_and_after_it_has_left(pair: ScriptedCluster) -> None:
    rng = random.Random(1)
    capacity = pair.capacities[0]
    script: Script = [
        (0, request(rng, "too large", capacity + 40, 5)),
        (0, request(rng, "beside", 30, 12)),
        (1, request(rng, "later", 30, 12)),
        (9, AbortRequest("too large")),
        (9, request(rng, "after", 30, 6)),
    ]
    got, _ = pair.play([script, []])
    assert got["too large"].reason == "abort"
    assert {rid: len(output.tokens) for rid, output in got.items()} == {
        "too large": 0,
        "beside": 12,
        "later": 12,
        "after": 6,
    }


def test_nothing_is_remembered_of_it_where_nobody_else_ran(pair: ScriptedCluster) -> None:
    """Its client leaves an instance in which nothing runs; the next one is served all the same."""
    rng = random.Random(2)
    script: Script = [
        (0, request(rng, "too large", pair.capacities[0] + 40, 5)),
        (0, Turns(3)),
        (0, AbortRequest("too large")),
        (0, request(rng, "after", 30, 6)),
    ]
    got, _ = pair.play([script, []])
    assert len(got["after"].tokens) == 6


def test_it_runs_when_a_drop_has_made_room(pair: ScriptedCluster) -> None:
    rng = random.Random(3)
    large = request(rng, "large", pair.capacities[0] + 40, 5)
    script: Script = [(0, large), (0, request(rng, "beside", 30, 60)), (9, Gate("drop"))]

    def drop(_: str) -> None:
        assert pair.transition(TransitionKind.DROP).status is Outcome.COMMITTED

    got, _ = pair.play([script, [(0, Gate("drop"))]], drop)
    assert len(got["large"].tokens) == 5
    assert len(got["beside"].tokens) == 60
    pair.restore_when_idle()

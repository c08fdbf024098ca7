"""Two instances of two ranks each: the tokens are those of a run without transitions.

Real schedulers, one process a rank, with collectives over gloo. What a drop, an exchange or a
restore does on one rank has to happen at the same place of the others' program, or the collectives
of a layer would wait for one another for good.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.core.transports import Transport
from kunserve_sglang.policy.transition_request import Outcome
from tests.support.cluster import ScriptedCluster
from tests.support.controlled import READY_S
from tests.support.identity import (
    PAIR_GATES,
    differences,
    play_both,
    play_into_a_drop,
    small_cluster,
)
from tests.support.schedules import Script, random_scripts, request
from tests.support.script import AbortRequest, Gate, Pause

BUDGET = 2_780_000
"""As many slots as the pair of `test_token_identity` has: embeddings and head are divided too."""


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedCluster]:
    folder = tmp_path_factory.mktemp("ranks")
    with small_cluster(folder, 2, tiny_model, memory_budget=BUDGET, ranks=2) as cluster:
        yield cluster


@pytest.mark.parametrize("seed", range(2), ids=lambda s: f"seed-{s}")
def test_two_cycles_in_a_random_schedule(pair: ScriptedCluster, seed: int) -> None:
    """Load on both owners in every phase, of which requests are retracted and aborted."""
    events, differences = play_both(pair, random_scripts(seed, 2, PAIR_GATES))
    assert differences == []
    assert len(events) >= 2
    assert events[0].capacity_after > events[0].capacity_before
    assert events[-1].capacity_after == events[0].capacity_before
    assert sum(e.exchanged_bytes for e in events) > 0
    assert max(pair.numbers(member)[0] for member in (0, 1)) > pair.capacities[0]


def test_running_requests_take_their_kv_along(pair: ScriptedCluster) -> None:
    """Micro-batches bring the rows that they need, on each rank those of its heads."""
    scripts = random_scripts(500, 2, ())
    expected = pair.play(scripts)
    with pair.pieces_held():
        got, dropping = play_into_a_drop(pair, scripts, 9)
    assert dropping.result(READY_S).status is Outcome.COMMITTED
    assert differences(expected, got) == []
    assert pair.transition(TransitionKind.RESTORE).status is Outcome.COMMITTED


def test_two_cycles_as_on_gpus(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With all that ranks on GPUs have: an emulated device, lanes, results one step later."""
    folder = tmp_path_factory.mktemp("as-on-gpus")
    with small_cluster(
        folder,
        2,
        tiny_model,
        memory_budget=BUDGET,
        ranks=2,
        device="cuda",
        transport=Transport.NCCL,
        disable_overlap_schedule=False,
    ) as cluster:
        events, differences = play_both(cluster, random_scripts(7, 2, PAIR_GATES))
    assert differences == []
    assert len(events) >= 2
    assert sum(e.exchanged_bytes for e in events) > 0


def test_pauses_and_aborts_while_cooperating(pair: ScriptedCluster) -> None:
    rng = random.Random(5)
    script: Script = [(0, request(rng, rid, 40, 25)) for rid in ("leaves", "stays")]
    expected = pair.play([script, script])
    assert pair.transition(TransitionKind.DROP).status is Outcome.COMMITTED
    paused: Script = [*script, (5, Pause("retract")), (5, AbortRequest("leaves"))]
    got = pair.play([paused, script])
    assert pair.transition(TransitionKind.RESTORE).status is Outcome.COMMITTED
    assert got[0]["leaves"].reason == "abort"
    assert differences(expected, got) == []


def test_both_ranks_of_a_survivor_go_on_alone(pair: ScriptedCluster) -> None:
    """A member dies in mid-decode: each rank of the other reads its shard again, and goes on."""
    rng = random.Random(8)
    script: Script = [(0, request(rng, f"r{i}", 30, 60)) for i in range(3)]
    expected = pair.play([script, script])[0]
    assert pair.transition(TransitionKind.DROP).status is Outcome.COMMITTED
    got = pair.play([[*script, (15, Gate("die"))]] * 2, lambda _: pair.kill(1))[0]
    assert got == expected
    pair.wait_until(lambda instances: instances[0]["mode"] == "independent")
    assert pair.play([script, []])[0] == expected

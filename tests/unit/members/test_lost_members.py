"""A member of a group dies: the others take back their requests, and answer them alone.

Real schedulers in processes of their own, of which one is killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.transition_request import Outcome
from tests.support.cluster import ScriptedCluster
from tests.support.schedules import random_scripts
from tests.support.script import Action, Add, Gate, Output

Script = list[tuple[int, Action]]
StartCluster = Callable[[int], ScriptedCluster]

RUNNING = 6
PROMPTS = [
    [entry for entry in script if isinstance(entry[1], Add)] for script in random_scripts(11, 3, ())
]


@pytest.fixture
def start_cluster(tiny_model: Path, tmp_path: Path) -> Iterator[StartCluster]:
    """Starts a cluster of so many members, ended after the test."""
    clusters = []

    def start(size: int) -> ScriptedCluster:
        cluster = ScriptedCluster(
            tmp_path,
            size,
            memory_budget=2_600_000,
            page_bytes=4096,
            vote_timeout_s=5.0,
            model_path=str(tiny_model),
            dtype="float32",
            max_running_requests=RUNNING,
            context_length=1024,
        )
        clusters.append(cluster)
        return cluster

    yield start
    for cluster in clusters:
        cluster.__exit__()


def long_answers(member: int, count: int = 3) -> Script:
    """Requests that come at once and take many steps."""
    prompts = [tuple(range(3 + member + i, 23 + member + i)) for i in range(count)]
    return [(0, Add(f"long-{member}-{i}", p, 120)) for i, p in enumerate(prompts)]


def steps(cluster: ScriptedCluster, member: int) -> int:
    """Micro-batches that it has sent round as an owner."""
    described = next(i for i in cluster.status() if i["id"] == member)
    return int(described["counters"]["micro_batches_own"])


def in_mid_decode(cluster: ScriptedCluster, member: int, before: int) -> None:
    """Returns once it has sent ten micro-batches more."""
    cluster.wait_until(lambda _: steps(cluster, member) > before + 10)


def begin(cluster: ScriptedCluster, scripts: list[Script]) -> Future[list[dict[str, Output]]]:
    pool = ThreadPoolExecutor(1)
    playing = pool.submit(cluster.play, scripts)
    pool.shutdown(wait=False)
    return playing


def survivors(cluster: ScriptedCluster, dead: int) -> list[dict[str, Any]]:
    return [i for i in cluster.status() if i["id"] != dead]


def wait_until_alone(cluster: ScriptedCluster, dead: int) -> None:
    """Until the survivors are full replicas again, with all their pages accounted for."""

    def alone(_: Any) -> bool:
        return all(
            i["mode"] == "independent" and len(i["group"]) == 1 for i in survivors(cluster, dead)
        )

    cluster.wait_until(alone)
    for instance in survivors(cluster, dead):
        pages = instance["pages"]
        assert pages["parameters"] + pages["kv"] + pages["free"] == pages["total"]
        assert instance["slots"]["capacity"] == cluster.capacities[instance["id"]]


def test_survivors_answer_everybody_and_go_on_alone(start_cluster: StartCluster) -> None:
    """Two of three survive; each answers again as if nothing had ever been dropped."""
    cluster = start_cluster(3)
    waiting = 3
    scripts = [long_answers(0, RUNNING + waiting), long_answers(1), long_answers(2)]
    whole = cluster.play(scripts)
    expected = cluster.play(PROMPTS)

    for _ in range(2):
        assert cluster.transition(TransitionKind.DROP).status is Outcome.COMMITTED
    assert all(len(i["group"]) == 3 for i in cluster.status())
    before = steps(cluster, 2)
    playing = begin(cluster, scripts)
    in_mid_decode(cluster, 2, before)
    cluster.kill(2)
    answers = playing.result(60)

    assert answers[:2] == whole[:2]
    wait_until_alone(cluster, dead=2)
    assert cluster.play(PROMPTS)[:2] == expected[:2]

    event = cluster.transition(TransitionKind.DROP)
    assert event.status is Outcome.COMMITTED
    assert event.instances == [0, 1]
    assert cluster.play(PROMPTS)[:2] == expected[:2]
    assert cluster.transition(TransitionKind.RESTORE).status is Outcome.COMMITTED
    assert cluster.play(PROMPTS)[:2] == expected[:2]


@pytest.mark.parametrize("kind", [TransitionKind.DROP, TransitionKind.RESTORE])
def test_a_transition_ends_when_a_member_dies_in_it(
    start_cluster: StartCluster, kind: TransitionKind
) -> None:
    """The group runs by the new layout, or still by the old one, and KV is on its way."""
    cluster = start_cluster(2)
    expected = cluster.play(PROMPTS[:2])
    scripts = [[*long_answers(i), (10, Gate("mid-decode"))] for i in range(2)]
    whole = cluster.play(scripts)
    if kind is TransitionKind.RESTORE:
        assert cluster.transition(TransitionKind.DROP).status is Outcome.COMMITTED

    def die_in_transition(_: str) -> None:
        epoch = max(i["epoch"] for i in cluster.status())
        transition = cluster.begin(kind)
        cluster.wait_until(lambda instances: all(i["epoch"] > epoch for i in instances))
        cluster.kill(1)
        assert transition.result(30).status is not Outcome.COMMITTED

    with cluster.pieces_held():
        answers = cluster.play(scripts, die_in_transition)
    assert answers[0] == whole[0]
    wait_until_alone(cluster, dead=1)
    assert cluster.play(PROMPTS[:2])[0] == expected[0]


def test_a_member_that_is_stopped_is_waited_for(start_cluster: StartCluster) -> None:
    """It does nothing at all, but its connections are open: it may come back, and does."""
    cluster = start_cluster(2)
    scripts = [long_answers(0), long_answers(1)]
    whole = cluster.play(scripts)
    assert cluster.transition(TransitionKind.DROP).status is Outcome.COMMITTED
    before = steps(cluster, 0)
    playing = begin(cluster, scripts)
    in_mid_decode(cluster, 0, before)
    with cluster.stopped(1):
        cluster.refuse_http(1)
        assert cluster.control.call(lambda plane: plane.losses.gone()) == set()
        assert all(i["mode"] != "recovering" for i in cluster.status())
    assert playing.result(60) == whole

"""Faults on purpose in real members: whatever happens to one, no answer becomes another one.

Of two members that begin and end a drop with answers under way, one suffers. What it has not
answered when it ends is the router's business; all else is compared, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from kunserve_sglang.api.events import Event
from kunserve_sglang.core.messages import Mode, TransitionKind
from kunserve_sglang.policy.transition_request import Outcome
from tests.support.cluster import ScriptedCluster
from tests.support.identity import differences
from tests.support.schedules import Script
from tests.support.script import Add, Gate, Output

Start = Callable[..., ScriptedCluster]
Answers = list[dict[str, Output]]

SUFFERER, OTHER = 1, 0
DROP, RESTORE = (10, Gate("drop")), (40, Gate("restore"))
SCRIPTS: list[Script] = [
    [(0, Add(f"{m}-{i}", tuple(range(3 + m + i, 43 + m + i)), 60)) for i in range(3)]
    for m in range(2)
]
LOST_OR_SPOILT = (
    "barrier.received:corrupt:1,exchange.received:corrupt:2,parameters.received:corrupt:2,"
    "exchange.sent:corrupt:4,exchange.received:drop:5,pipeline.sent:drop:200"
)
CYCLES = 12


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts two members, of which one suffers these faults."""
    clusters = []

    def begin(faults: str, *, checksums: bool = True) -> ScriptedCluster:
        cluster = ScriptedCluster(
            tmp_path,
            2,
            memory_budget=2_600_000,
            page_bytes=4096,
            vote_timeout_s=5.0,
            peer_timeout_s=6.0,
            checksums=checksums,
            faults={SUFFERER: faults},
            model_path=str(tiny_model),
            dtype="float32",
            max_running_requests=6,
            context_length=1024,
        )
        clusters.append(cluster)
        return cluster

    yield begin
    for cluster in clusters:
        cluster.__exit__()


def play_with(cluster: ScriptedCluster, *gates: tuple[int, Gate]) -> Answers:
    """Play with transitions in the middle, whatever comes of these."""
    running: list[Future[Event]] = []

    def at_gate(name: str) -> None:
        running.append(cluster.begin(TransitionKind(name)))

    answers = cluster.play([[*script, *gates] for script in SCRIPTS], at_gate)
    for transition in running:
        transition.exception(60)
    return answers


def become_independent(cluster: ScriptedCluster) -> None:
    """As soon as nothing of what has happened is under way any more."""

    def independent(now: list[dict[str, object]]) -> bool:
        if any(i["mode"] == Mode.COOPERATIVE for i in now):
            cluster.begin(TransitionKind.RESTORE).exception(60)
        return all(i["mode"] == Mode.INDEPENDENT for i in now)

    cluster.wait_until(independent, 60)


def test_what_is_lost_or_spoilt_between_members_is_noticed(start: Start) -> None:
    cluster = start(LOST_OR_SPOILT)
    expected = cluster.play(SCRIPTS)
    for _ in range(CYCLES):
        assert differences(expected, play_with(cluster, DROP, RESTORE)) == []
        become_independent(cluster)
        if cluster.faults_have_happened(SUFFERER):
            break
    else:
        raise AssertionError(f"not all of {LOST_OR_SPOILT} have happened")
    assert cluster.transition(TransitionKind.DROP).status is Outcome.COMMITTED
    assert differences(expected, cluster.play(SCRIPTS)) == []
    assert cluster.transition(TransitionKind.RESTORE).status is Outcome.COMMITTED


def test_without_checksums_there_would_be_other_answers(start: Start) -> None:
    cluster = start("exchange.received:corrupt:1", checksums=False)
    expected = cluster.play(SCRIPTS)
    assert differences(expected, play_with(cluster, DROP)) != []
    assert cluster.faults_have_happened(SUFFERER)


@pytest.mark.parametrize("fault", ["transition.mapped:crash:1", "exchange.received:hang:2"])
def test_the_other_answers_all_of_its_own(start: Start, fault: str) -> None:
    """One that stands still is given up by itself; somebody kills it later."""
    cluster = start(fault)
    expected = cluster.play(SCRIPTS)
    with ThreadPoolExecutor(1) as pool:
        playing = pool.submit(play_with, cluster, DROP)

        def suffered(now: list[dict[str, object]]) -> bool:
            return cluster.has_ended(SUFFERER) or now[OTHER]["mode"] == Mode.RECOVERING

        cluster.wait_until(suffered, 60)
        cluster.kill(SUFFERER)
        answers = playing.result(60)
    assert differences(expected[:SUFFERER], answers[:SUFFERER]) == []
    cluster.wait_until(lambda now: now[OTHER]["mode"] == Mode.INDEPENDENT, 60)
    assert differences(expected[:SUFFERER], cluster.play(SCRIPTS)[:SUFFERER]) == []

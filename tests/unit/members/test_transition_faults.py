"""Members that refuse, answer late or never: the others go on in the old mode (invariant 6).

Real schedulers in processes of their own; a member is stopped with SIGSTOP to make it silent.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.transition_request import Outcome
from tests.support.cluster import ScriptedCluster
from tests.support.schedules import random_scripts
from tests.support.script import Output

PROMPTS = random_scripts(7, 2, ())


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedCluster]:
    with ScriptedCluster(
        tmp_path_factory.mktemp("faults"),
        2,
        memory_budget=2_600_000,
        page_bytes=4096,
        vote_timeout_s=1.0,
        model_path=str(tiny_model),
        dtype="float32",
        max_running_requests=16,
        context_length=1024,
    ) as cluster:
        yield cluster


def _serves_as_before(cluster: ScriptedCluster, expected: list[dict[str, Output]]) -> None:
    assert cluster.play(PROMPTS) == expected


def test_a_silent_member_aborts_the_drop_in_time(pair: ScriptedCluster) -> None:
    expected = pair.play(PROMPTS)
    with pair.stopped(1):
        event = pair.transition(TransitionKind.DROP)
    assert event.status is Outcome.ABORTED
    assert "instance 1 did not answer PREPARE within 1 s" in event.error
    assert event.duration_ms < 5000
    assert event.capacity_after == event.capacity_before
    pair.wait_for_modes({"independent"})
    _serves_as_before(pair, expected)


def test_a_member_that_wakes_up_late_can_drop_afterwards(pair: ScriptedCluster) -> None:
    """Its late vote and the abort that waits for it do no harm."""
    expected = pair.play(PROMPTS)
    with pair.stopped(0):
        assert pair.transition(TransitionKind.DROP).status is Outcome.ABORTED
    pair.wait_for_modes({"independent"})
    assert pair.transition(TransitionKind.DROP).status is Outcome.COMMITTED
    _serves_as_before(pair, expected)
    assert pair.transition(TransitionKind.RESTORE).status is Outcome.COMMITTED
    _serves_as_before(pair, expected)


def test_a_silent_member_aborts_a_restore_too(pair: ScriptedCluster) -> None:
    expected = pair.play(PROMPTS)
    assert pair.transition(TransitionKind.DROP).status is Outcome.COMMITTED
    with pair.stopped(1):
        assert pair.transition(TransitionKind.RESTORE).status is Outcome.ABORTED
    pair.wait_for_modes({"cooperative"})
    _serves_as_before(pair, expected)
    assert pair.transition(TransitionKind.RESTORE).status is Outcome.COMMITTED


def test_a_plan_from_a_stale_epoch_is_refused(pair: ScriptedCluster) -> None:
    """A coordinator that lags behind the instances cannot change anything."""
    event = pair.transition_with_epoch(TransitionKind.DROP, 0)
    assert event.status is Outcome.ABORTED
    assert "is not after" in event.error
    pair.wait_for_modes({"independent"})

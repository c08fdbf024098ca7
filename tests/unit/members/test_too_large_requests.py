"""What is larger than the instance waits for a drop; it holds up nobody, and leaves no trace."""

from __future__ import annotations

import random

import pytest

from kunserve_sglang.core.messages import Mode
from tests.support.cluster import ScriptedCluster
from tests.support.schedules import Script, request
from tests.support.script import AbortRequest, Gate, Turns, Wedge


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
    with pair.policy_on(drops=False):
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
    with pair.policy_on(drops=False):
        got, _ = pair.play([script, []])
    assert len(got["after"].tokens) == 6


def test_a_scheduler_that_does_nothing_begins_anew(pair: ScriptedCluster) -> None:
    """It has room and somebody waits; whatever keeps it from its work, it takes it up again."""
    script: Script = [(0, request(random.Random(4), "waits", 30, 6)), (0, Wedge())]
    got, _ = pair.play([script, []])
    assert len(got["waits"].tokens) == 6


def test_it_runs_when_a_drop_has_made_room(pair: ScriptedCluster) -> None:
    """It is taken in as long as the policy may make room for it, which it does by itself."""
    rng = random.Random(3)
    script: Script = [
        (0, request(rng, "large", pair.capacities[0] + 40, 5)),
        (0, request(rng, "beside", 30, 60)),
    ]
    with pair.policy_on():
        got, _ = pair.play([script, []])
        assert len(got["large"].tokens) == 5
        assert len(got["beside"].tokens) == 60
        pair.wait_for_modes({Mode.INDEPENDENT})


def test_it_is_refused_where_nothing_could_make_room(pair: ScriptedCluster) -> None:
    """At once, and in words; an answer is as long as there is room for."""
    rng = random.Random(5)
    capacity = pair.capacities[0]
    script: Script = [
        (0, request(rng, "too large", capacity + 40, 5)),
        (0, request(rng, "too long", 100, capacity)),
    ]
    got, _ = pair.play([script, []])
    assert "exceeds the maximum allowed length" in got["too large"].end["message"]
    assert len(got["too long"].tokens) == capacity - 102


@pytest.mark.parametrize("way", ["policy", "partner", "limit"])
def test_it_is_told_when_the_way_to_room_is_closed(pair: ScriptedCluster, way: str) -> None:
    """The policy is switched off while it waits, the only partner is about to leave, or tokens of
    a group would take too long; others are served all the while."""

    def close(_: object) -> None:
        if way == "policy":
            pair.set_policy(False, {})
        elif way == "partner":
            pair.set_draining(1, draining=True)
        else:
            pair.set_tpot_limit(1e-3)

    rng = random.Random(6)
    large = request(rng, "too large", pair.capacities[0] + 40, 5)
    script: Script = [
        (0, large),
        (0, Gate("off")),
        (0, request(rng, "beside", 30, 12)),
        (14, request(rng, "after", 30, 6)),
    ]
    with pair.policy_on(drops=False):
        try:
            got, _ = pair.play([script, [(0, Gate("off"))]], close)
        finally:
            pair.set_draining(1, draining=False)
            pair.set_tpot_limit(None)
    assert "can be had for one request" in got["too large"].end["message"]
    assert len(got["beside"].tokens) == 12
    assert len(got["after"].tokens) == 6

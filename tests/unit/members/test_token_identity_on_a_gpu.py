"""Greedy tokens on an emulated GPU, with drops and restores, are those of an undisturbed run."""

from __future__ import annotations

import random

import pytest

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.transition_request import Outcome
from tests.support.cluster import ScriptedCluster
from tests.support.identity import (
    PAIR_GATES,
    play_both,
)
from tests.support.schedules import Script, random_scripts, request


@pytest.mark.parametrize("seed", range(700, 702), ids=lambda s: f"seed-{s}")
def test_two_cycles_on_an_emulated_gpu(pair_on_a_gpu: ScriptedCluster, seed: int) -> None:
    """What is on the device and what is on the host are never taken for one another.

    Nobody waits for KV on its way, but where its packets come and go.
    """
    events, differences = play_both(pair_on_a_gpu, random_scripts(seed, 2, PAIR_GATES))
    assert differences == []
    assert len(events) >= 2
    assert sum(e.exchanged_bytes for e in events) > 0
    for member in (0, 1):
        waits = pair_on_a_gpu.waits(member)
        assert not [w for w in waits if w.startswith("kunserve_sglang.instance.transfer.transfer.")]


def test_how_often_a_micro_batch_waits_for_the_device(pair_on_a_gpu: ScriptedCluster) -> None:
    """Once to tell what is in the owner's table, and at every member where a packet comes or goes.

    That, and for the time that layers take.
    """
    assert pair_on_a_gpu.transition(TransitionKind.DROP).status is Outcome.COMMITTED
    busy: Script = [(0, request(random.Random(1), "busy", 30, 20))]
    for member in (0, 1):
        pair_on_a_gpu.waits(member)
    pair_on_a_gpu.play([busy, []])
    owner, stage = (pair_on_a_gpu.waits(member) for member in (0, 1))
    assert pair_on_a_gpu.transition(TransitionKind.RESTORE).status is Outcome.COMMITTED
    batches = owner["kunserve_sglang.instance.pipeline.sent_rows._compared"]
    assert batches >= 20
    layers_and_packets = {
        "kunserve_sglang.sglang_seam.engine.settle": batches,
        "kunserve_sglang.transport.cuda_ring._settle": 2 * batches,
    }
    told = {"kunserve_sglang.instance.pipeline.sent_rows._compared": batches}
    assert owner == {**layers_and_packets, **told}
    assert stage == layers_and_packets

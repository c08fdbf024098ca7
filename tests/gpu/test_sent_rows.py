"""What an owner tells its group of a table in the memory of a GPU, and how often it waits."""

from __future__ import annotations

import warnings

import pytest
import torch

from kunserve_sglang.instance.packets.request_table import MirroredRows
from kunserve_sglang.instance.pipeline.sent_rows import DeviceSentRows, sent_rows
from tests.support.owner import BASE, CONTEXT, ROWS, Owner, follow

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("seed", range(10))
def test_a_stage_that_follows_sees_what_the_owner_sees(seed: int) -> None:
    owner = Owner(seed, device="cuda")
    sent, mirror = sent_rows(owner.table), MirroredRows(ROWS, CONTEXT, BASE, owner.table.device)
    assert isinstance(sent, DeviceSentRows)
    for _ in range(25):
        follow(owner, sent, mirror, owner.step())


def test_a_decode_step_waits_for_the_device_once() -> None:
    owner = Owner(1, device="cuda")
    sent = sent_rows(owner.table)
    sent.difference(owner.grow([0, 1], [9, 5], decode=False))
    step = owner.grow([1, 0], [1, 1], decode=True)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            sent.difference(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in found if "synchronizing CUDA operation" in str(w.message)]) == 1

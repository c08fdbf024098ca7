"""What an owner tells its group of its table: always enough, and with few copies from a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sglang.instance.packets.request_table import MirroredRows
from kunserve_sglang.instance.parts.engine import StageBatch
from kunserve_sglang.instance.pipeline.sent_rows import DeviceSentRows, HostSentRows, sent_rows
from tests.support.owner import BASE, CONTEXT, ROWS, Owner, follow


@pytest.mark.parametrize("kind", [HostSentRows, DeviceSentRows])
@settings(max_examples=50)
@given(seed=st.integers(0, 10_000))
def test_a_stage_that_follows_sees_what_the_owner_sees(kind: Any, seed: int) -> None:
    owner = Owner(seed)
    sent, mirror = kind(owner.table), MirroredRows(ROWS, CONTEXT, BASE, owner.table.device)
    for _ in range(25):
        follow(owner, sent, mirror, owner.step())


def test_rows_longer_than_a_block_are_compared_to_their_end() -> None:
    owner = Owner(1, context=20_000)
    sent, mirror = DeviceSentRows(owner.table), MirroredRows(ROWS, 20_000, BASE, owner.table.device)
    follow(owner, sent, mirror, owner.grow([0, 2], [19_000, 9000], decode=False))
    for row, place in ((0, 0), (0, 18_999), (2, 8191), (2, 8192)):
        owner.table[row, place] = 7
        follow(owner, sent, mirror, owner.grow([2, 0], [1, 1], decode=True))


def test_what_is_known_is_not_told_again() -> None:
    for kind in (HostSentRows, DeviceSentRows):
        owner = Owner(2)
        sent = kind(owner.table)
        assert len(sent.difference(owner.grow([0, 1], [9, 5], decode=False))[1].slots) == 14
        assert len(sent.difference(owner.grow([1, 0], [1, 1], decode=True))[1].slots) == 2
        assert len(sent.difference(owner.grow([0], [4], decode=False))[1].slots) == 4


def test_where_the_table_is_says_how_it_is_compared() -> None:
    assert isinstance(sent_rows(torch.zeros((2, 2), dtype=torch.int32)), HostSentRows)
    assert isinstance(
        sent_rows(torch.zeros((2, 2), dtype=torch.int32, device="meta")), DeviceSentRows
    )


def test_rows_are_where_attention_reads_them_unless_they_are_too_many() -> None:
    device = torch.device("meta")
    assert MirroredRows(512, 32_768, BASE, device).table.device == device
    assert MirroredRows(513, 32_768, BASE, device).table.device.type == "cpu"


class OnDevice(torch.Tensor):
    """Host memory that stands for a device's: whoever wants to look at it must copy it first."""

    copies = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("item", "tolist", "numpy", "__bool__", "__int__", "__index__", "equal"):
            raise AssertionError(f"{name} waits for the device")
        result = super().__torch_function__(func, types, args, kwargs or {})
        if name == "cpu":
            OnDevice.copies += 1
            return result.as_subclass(torch.Tensor)
        return result


def there(batch: StageBatch) -> StageBatch:
    values = {name: getattr(batch, name) for name in StageBatch.__dataclass_fields__}
    return StageBatch(**{**values, "out_slots": batch.out_slots.as_subclass(OnDevice)})


def test_a_decode_step_takes_one_copy_from_the_device() -> None:
    """And so does a prompt without a cached prefix; with one, its slots take a second."""
    owner = Owner(3)
    sent = DeviceSentRows(owner.table.as_subclass(OnDevice))
    steps = [
        (owner.grow, [0, 1], [9, 5], False, 1),
        (owner.grow, [1, 0], [1, 1], True, 1),
        (owner.grow, [0], [4], False, 1),
    ]
    for grow, rows, tokens, decode, copies in steps:
        before = OnDevice.copies
        sent.difference(there(grow(rows, tokens, decode)))
        assert OnDevice.copies - before == copies
    owner.lengths[2] = 6
    before = OnDevice.copies
    told, delta = sent.difference(there(owner.grow([2, 1], [3, 2], decode=False)))
    assert OnDevice.copies - before == 2
    assert delta.starts.tolist() == [0, 6]
    assert not isinstance(told.out_slots, OnDevice)

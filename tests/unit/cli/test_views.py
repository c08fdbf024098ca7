"""The memory bar: whose pages it counts, and that it is always as long as it should be."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kunserve_sglang.api.types import InstanceStatus
from kunserve_sglang.cli.bar import Legend, MemoryBar, Shares, memory_shares
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.core.load import Pages, Slots
from kunserve_sglang.core.messages import Mode


def instance(number: int, used: int, cached: int, *, group: tuple[int, ...]) -> InstanceStatus:
    return InstanceStatus(
        id=number,
        url="",
        mode=Mode.COOPERATIVE,
        serving=True,
        in_flight=0,
        layer_count=4,
        group=group,
        layers=LayerRange(0, 2),
        pages=Pages(parameters=20, kv=70, free=10, total=100),
        slots=Slots(used=used, cached=cached, capacity=100),
    )


def drawn(bar: MemoryBar | Legend, encoding: str = "utf-8", width: int = 40) -> str:
    # A real encoding, since rich asks the file for it.
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width)
    console.print(bar, end="")
    file.seek(0)
    return file.read()


def test_pages_of_a_group_are_as_full_as_all_its_slots() -> None:
    group = (0, 1)
    instances = [
        instance(0, 100, 0, group=group),
        instance(1, 0, 50, group=group),
        instance(2, 100, 0, group=(2,)),
    ]
    for member in instances[:2]:
        shares = memory_shares(member, instances)
        assert shares is not None
        assert shares.parameters == pytest.approx(0.2)
        assert shares.used == pytest.approx(0.7 * 100 / 200)
        assert shares.cached == pytest.approx(0.7 * 50 / 200)
        assert shares.free == pytest.approx(1 - 0.2 - 0.35 - 0.175)
    alone = memory_shares(instances[2], instances)
    assert alone is not None
    assert (alone.used, alone.cached) == (pytest.approx(0.7), 0)


def test_more_used_than_there_is_fits_the_bar() -> None:
    """Reports of two members are of two moments; for one of them the group may seem overfull."""
    over = instance(0, 130, 20, group=(0,))
    shares = memory_shares(over, [over])
    assert shares is not None
    assert shares.used == pytest.approx(0.7)
    assert shares.cached == 0
    assert shares.free == pytest.approx(0.1)


def test_without_a_report_there_is_no_bar() -> None:
    silent = InstanceStatus(id=0, url="", mode=Mode.DEAD, serving=False, in_flight=0, layer_count=4)
    assert memory_shares(silent, [silent]) is None


@pytest.mark.parametrize("width", [8, 11, 24, 40])
def test_the_bar_is_as_long_as_it_should_be(width: int) -> None:
    thirds = Shares(parameters=1 / 3, used=1 / 3, cached=1 / 6, free=1 / 6)
    assert len(drawn(MemoryBar(thirds), width=width).strip("\n")) == min(width, 24)
    assert drawn(MemoryBar(thirds), width=24).strip("\n") == 8 * "█" + 8 * "▓" + 4 * "▒" + 4 * "░"


def test_without_unicode_it_is_drawn_in_ascii() -> None:
    halves = Shares(parameters=0.5, used=0.25, cached=0.0, free=0.25)
    assert drawn(MemoryBar(halves), "ascii").strip("\n") == 12 * "#" + 6 * "=" + 6 * "."
    assert drawn(Legend(), "ascii").startswith("# parameters")

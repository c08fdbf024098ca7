"""What an instance says of itself to the router, for instances that have no model."""

from __future__ import annotations

from collections.abc import Mapping

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.layout import LayerRange, Layout, Member, MemoryProfile
from kunserve_sglang.core.load import Load, Pages, Slots
from kunserve_sglang.core.messages import PROTOCOL_VERSION, Hello, Mode, Status

LAYERS = 4
PROFILE = MemoryProfile(
    page_bytes=4096,
    pages=200,
    layer_pages=(25,) * LAYERS,
    key_row_bytes=256,
    value_row_bytes=256,
    stride=4096,
    owners=8,
)
COSTS = CostModel(prefill=(0.0,) * 6, decode=(1.0, 1.0, 0.0))
CAPACITY = PROFILE.capacity(LayerRange(0, LAYERS), 1)
NO_LOAD = Load(slots=Slots(used=0, cached=0, capacity=CAPACITY), running=0, waiting=0, demand=0)


def whole(number: int) -> Member:
    """The member while it holds all layers."""
    return Member(
        instance=number, layers=LayerRange(0, LAYERS), capacity=CAPACITY, address=f"d{number}"
    )


def hello(number: int, url: str) -> Hello:
    return Hello(
        version=PROTOCOL_VERSION,
        instance=number,
        url=url,
        data_address=f"d{number}",
        scheduler="mock",
        layer_count=LAYERS,
        memory=PROFILE,
        capacity=CAPACITY,
        costs=COSTS,
    )


def status(number: int, layout: Layout, load: Load, counters: Mapping[str, int]) -> Status:
    """What it reports while it goes by `layout`."""
    parameters = PROFILE.parameter_pages(layout.member(number).layers)
    return Status(
        instance=number,
        epoch=layout.epoch,
        mode=Mode.COOPERATIVE if layout.cooperative else Mode.INDEPENDENT,
        layout=layout,
        pages=Pages(
            parameters=parameters, kv=PROFILE.pages - parameters, free=0, total=PROFILE.pages
        ),
        load=load,
        counters=dict(counters),
    )

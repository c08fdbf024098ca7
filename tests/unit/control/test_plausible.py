"""What instances say is believed only where it can be true."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.control.plausible import check_hello, check_sender, check_status
from kunserve_sglang.core.bounds import MAX_COUNT
from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.layout import LayerRange, Layout, Member
from kunserve_sglang.core.load import Load, Pages, Slots
from kunserve_sglang.core.messages import (
    PROTOCOL_VERSION,
    Hello,
    Mode,
    Status,
    connection_name,
    decode_to_router,
    encode,
)
from kunserve_sglang.testing.mock_member import CAPACITY, COSTS, LAYERS, PROFILE

_MEMBERS = tuple(
    Member(instance=i, layers=LayerRange(2 * i, 2 * i + 2), capacity=CAPACITY, address=f"d{i}")
    for i in range(2)
)
_LAYOUT = Layout(epoch=3, members=_MEMBERS)
_HELLO = Hello(
    version=PROTOCOL_VERSION,
    instance=1,
    url="http://127.0.0.1:30001",
    data_address="d1",
    scheduler="s",
    layer_count=LAYERS,
    memory=PROFILE,
    capacity=CAPACITY,
    costs=COSTS,
)
_STATUS = Status(
    instance=1,
    epoch=3,
    mode=Mode.COOPERATIVE,
    layout=_LAYOUT,
    pages=Pages(parameters=50, kv=150, free=0, total=200),
    load=Load(slots=Slots(used=0, cached=0, capacity=CAPACITY), running=0, waiting=0, demand=0),
)


def test_the_truth_is_believed() -> None:
    check_sender(b"instance-1", _HELLO)
    check_hello(_HELLO)
    check_hello(msgspec.structs.replace(_HELLO, costs=None, url="http://[::1]:5"))
    check_status(_STATUS, _HELLO)


@pytest.mark.parametrize("identity", [b"instance-0", b"instance-01", b"", b"\xff"])
def test_nobody_speaks_for_another(identity: bytes) -> None:
    for message in (_HELLO, _STATUS):
        with pytest.raises(msgspec.ValidationError, match="speaks for instance 1"):
            check_sender(identity, message)


@pytest.mark.parametrize(
    "change",
    [
        {"layer_count": LAYERS + 1},
        {"url": "ftp://127.0.0.1:1"},
        {"url": "http://127.0.0.1"},
        {"url": "http://127.0.0.1:99999"},
        {"url": "http://[::1"},
        {"costs": CostModel(prefill=(1.0,), decode=COSTS.decode)},
    ],
)
def test_a_hello_that_cannot_be_true(change: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        check_hello(msgspec.structs.replace(_HELLO, **change))


@pytest.mark.parametrize(
    "status",
    [
        msgspec.structs.replace(_STATUS, instance=2),
        msgspec.structs.replace(_STATUS, epoch=4),
        msgspec.structs.replace(_STATUS, layout=Layout(epoch=3, members=_MEMBERS[1:])),
        msgspec.structs.replace(_STATUS, layout=Layout(epoch=3, members=_MEMBERS[::-1])),
        msgspec.structs.replace(_STATUS, layout=Layout(epoch=3, members=_MEMBERS * 2)),
    ],
)
def test_a_status_that_cannot_be_true(status: Status) -> None:
    with pytest.raises(msgspec.ValidationError):
        check_status(status, _HELLO)


def _numbers(value: object, put: Callable[[object], None]) -> list[Callable[[object], None]]:
    """A setter for every number inside `value`, which is what `put` replaces as a whole."""
    if isinstance(value, dict):
        return [s for k in value for s in _numbers(value[k], lambda v, k=k: value.update({k: v}))]
    if isinstance(value, list):
        return [
            s
            for at in range(len(value))
            for s in _numbers(value[at], lambda v, at=at: value.__setitem__(at, v))
        ]
    return [put] if isinstance(value, int | float) and not isinstance(value, bool) else []


@given(st.data())
def test_no_number_is_out_of_bounds(data: st.DataObject) -> None:
    """Wherever one stands: it has no sign, an end, and is a number."""
    message = data.draw(st.sampled_from([_HELLO, _STATUS]))
    fields = msgspec.to_builtins(message)
    fields.pop("version", None)  # any other is answered, and then refused
    setters = _numbers(fields, lambda _: None)
    wrong = [float("nan"), float("inf"), -float("inf"), MAX_COUNT * 1e9, 1 << 63]
    data.draw(st.sampled_from(setters))(data.draw(st.sampled_from(wrong)))
    with pytest.raises(msgspec.ValidationError):
        decode_to_router(msgspec.msgpack.encode({**fields, "version": 1}))


def test_what_was_sent_is_what_is_read() -> None:
    for message in (_HELLO, _STATUS):
        assert decode_to_router(encode(message)) == message
    assert connection_name(1) == b"instance-1"

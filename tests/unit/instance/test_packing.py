"""What a micro-batch says of its requests, as integers on their way to a stage and back."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.instance.packets import packing, wire
from kunserve_sglang.instance.packets.request_table import TableDelta
from kunserve_sglang.instance.parts.engine import StageBatch

OWNER = 3
_spans = st.lists(
    st.tuples(
        st.integers(0, 4000),  # row
        st.integers(0, 40),  # prefix
        st.integers(1, 40),  # new tokens
        st.integers(0, 40),  # of the prefix, what is told anew
    ),
    min_size=1,
    max_size=12,
)


def described(
    spans: list[tuple[int, int, int, int]], *, decode: bool
) -> tuple[StageBatch, TableDelta]:
    rows = torch.tensor([row for row, *_ in spans])
    prefixes = torch.tensor([prefix for _, prefix, _, _ in spans], dtype=torch.int32)
    new = torch.tensor([1 if decode else count for _, _, count, _ in spans], dtype=torch.int32)
    ends = (prefixes + new).long()
    tokens = int(new.sum())
    lengths = torch.tensor([min(p, told) for _, p, _, told in spans]) + new.long()
    batch = StageBatch(
        owner=OWNER,
        rows=rows,
        seq_lens=ends,
        positions=torch.arange(tokens) + 7,
        out_slots=torch.arange(tokens) + (1 << 30),
        prefix_lens=None if decode else prefixes,
        extend_lens=None if decode else new,
    )
    slots = torch.arange(int(lengths.sum()), dtype=torch.int32) + 11
    return batch, TableDelta(rows, ends - lengths, lengths, slots)


def header(packed: packing.Packed | None, *, residual: bool = False) -> wire.MicroBatch:
    return wire.MicroBatch(
        sender=0,
        epoch=1,
        owner=OWNER,
        sequence=5,
        position=0,
        packed=packed,
        has_residual=residual,
        launched=1.0,
        cost_ms=2.0,
        round_ms=3.0,
    )


def assert_equal(got: object, want: object) -> None:
    for field in fields(want):  # type: ignore[arg-type]
        mine, theirs = getattr(got, field.name), getattr(want, field.name)
        if isinstance(theirs, torch.Tensor):
            assert torch.equal(mine.long(), theirs.long()), field.name
        else:
            assert mine == theirs, field.name


@given(_spans, st.booleans(), st.booleans(), st.booleans())
def test_it_arrives_as_it_was(
    spans: list[tuple[int, int, int, int]], decode: bool, residual: bool, few: bool
) -> None:
    """In the header or beside it, with and without a residual stream."""
    batch, delta = described(spans, decode=decode)
    packed, beside = packing.pack(batch, delta)
    if not few:
        integers = torch.frombuffer(bytearray(packed.inline), dtype=torch.int64)
        packed = packing.Packed(packed.requests, packed.tokens, packed.slots, decode, b"")
        beside = [integers]
    hidden = torch.rand(len(batch.positions), 4), torch.rand(2, 4) if residual else None
    tensors = wire.tensors_of(beside, hidden)
    arrived = wire.decode(wire.encode(header(packed, residual=residual)))
    assert isinstance(arrived, wire.MicroBatch)
    assert arrived.packed is not None
    got = packing.unpack(OWNER, arrived.packed, wire.described_by(arrived, tensors))
    assert_equal(got[0], batch)
    assert_equal(got[1], delta)
    assert got[0].decode == decode
    assert all(
        t is None or t.dtype == torch.int32 for t in (got[0].prefix_lens, got[0].extend_lens)
    )
    assert all(t.dtype == torch.int64 for t in (got[0].rows, got[0].positions, got[0].out_slots))
    states, stream = wire.hidden_of(arrived, tensors)
    assert states is hidden[0]
    assert stream is hidden[1]


def test_a_table_that_has_nothing_new_takes_no_place() -> None:
    """Nothing to tell of some rows, or of all."""
    batch, _ = described([(1, 5, 1, 0), (2, 9, 1, 0)], decode=True)
    nothing = torch.empty(0, dtype=torch.int32)
    delta = TableDelta(batch.rows, batch.seq_lens, torch.zeros(2, dtype=torch.int64), nothing)
    packed, beside = packing.pack(batch, delta)
    assert beside == []
    got = packing.unpack(OWNER, packed, beside)
    assert_equal(got[0], batch)
    assert_equal(got[1], delta)


def test_few_integers_go_into_the_header_and_many_beside_it() -> None:
    few, _ = packing.pack(*described([(row, 500, 1, 0) for row in range(250)], decode=True))
    many, beside = packing.pack(*described([(0, 0, 4096, 0)], decode=False))
    assert 0 < len(few.inline) <= packing.INLINE_BYTES
    assert many.inline == b""
    (integers,) = beside
    assert integers.nbytes > packing.INLINE_BYTES
    got, _ = packing.unpack(OWNER, many, beside)
    assert len(got.positions) == 4096


def test_what_goes_home_is_hidden_states_alone() -> None:
    hidden = torch.rand(3, 4), torch.rand(3, 4)
    tensors = wire.tensors_of([], hidden)
    home = header(None, residual=True)
    assert wire.described_by(home, tensors) == []
    assert wire.hidden_of(home, tensors) == (tensors[0], tensors[1])


@pytest.mark.parametrize("count", [0, 1, packing.INLINE_BYTES // 8, packing.INLINE_BYTES // 8 + 1])
def test_integers_are_inline_if_they_are_few(count: int) -> None:
    integers = torch.arange(count)
    inline, beside = packing.inlined(integers)
    assert len(inline) + sum(t.nbytes for t in beside) == integers.nbytes
    assert len(beside) == (integers.nbytes > packing.INLINE_BYTES)
    assert torch.equal(packing.integers_of(inline, beside), integers)

"""Which number format is taken, and what the user is told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.execution.dtypes import FLOAT32, choose_dtype

MIB = 1 << 20


def test_a_model_stays_as_it_is_where_that_costs_nothing() -> None:
    for slower in (0.5, 1.0, 1.2):
        choice = choose_dtype("bfloat16", slower, 256 * MIB, 4096 * MIB)
        assert (choice.dtype, choice.note) == ("bfloat16", "")


def test_the_faster_one_is_taken_where_it_fits() -> None:
    choice = choose_dtype("bfloat16", 4.0, 256 * MIB, 4096 * MIB)
    assert choice.dtype == FLOAT32
    assert "4.0 times" in choice.note
    assert "--dtype bfloat16" in choice.note


def test_a_budget_that_is_too_small_for_it_is_named() -> None:
    choice = choose_dtype("float16", 4.0, 300 * MIB, 448 * MIB)
    assert choice.dtype == "float16"
    assert "--memory-budget 1000.0 MiB" in choice.note
    assert choose_dtype("float16", 4.0, 300 * MIB, 1001 * MIB).dtype == FLOAT32


@given(st.floats(0.01, 100), st.integers(1, 1 << 40), st.integers(0, 1 << 40))
def test_what_is_taken_leaves_room_for_kv(slower: float, own_bytes: int, budget: int) -> None:
    choice = choose_dtype("bfloat16", slower, own_bytes, budget)
    if choice.dtype == FLOAT32:
        assert slower > 1
        assert 2 * own_bytes < budget

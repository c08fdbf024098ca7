"""What the history of answers says of those that are under way."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.execution.output_length import OutputLengths

LIMIT = 1000


def seen(lengths: list[int], **flags: int) -> OutputLengths:
    known = OutputLengths(**flags)
    for tokens in lengths:
        known.ended(tokens, LIMIT)
    return known


def test_without_history_a_part_of_the_limit_is_expected() -> None:
    assert seen([10] * 7).remaining(0, LIMIT, unknown=0.5) == 500
    assert seen([10] * 8).remaining(0, LIMIT, unknown=0.5) == 10


def test_an_answer_is_compared_with_those_that_got_this_far() -> None:
    known = seen([10] * 90 + [200] * 10)
    assert known.remaining(0, LIMIT, unknown=0.5) == 10
    assert known.remaining(10, LIMIT, unknown=0.5) == 190
    assert known.remaining(150, LIMIT, unknown=0.5) == 50
    assert known.remaining(200, LIMIT, unknown=0.5) == 400


def test_other_limits_are_other_requests() -> None:
    known = seen([10] * 20)
    assert known.remaining(0, 100, unknown=0.5) == 50
    assert known.remaining(0, 900, unknown=0.5) == 10


def test_a_route_of_its_own_counts_before_all_others() -> None:
    known = seen([10] * 20)
    for _ in range(8):
        known.ended(300, LIMIT, route="chat")
    assert known.remaining(0, LIMIT, unknown=0.5, route="chat") == 300
    assert known.remaining(0, LIMIT, unknown=0.5, route="search") == 10


def test_old_answers_and_old_kinds_are_forgotten() -> None:
    known = seen([500] * 50 + [20] * 16, history=16)
    assert known.remaining(0, LIMIT, unknown=0.5) == 20
    few = OutputLengths(kinds=2)
    for limit in (LIMIT, 100, 10):
        for _ in range(8):
            few.ended(5, limit)
    assert few.remaining(0, 10, unknown=0.9) == few.remaining(0, 100, unknown=0.9) == 5
    assert few.remaining(0, LIMIT, unknown=0.9) == 900


@given(st.lists(st.integers(0, 1200), max_size=80), st.integers(0, 1300), st.floats(0, 1))
def test_never_more_than_is_left(lengths: list[int], produced: int, unknown: float) -> None:
    more = seen(lengths).remaining(produced, LIMIT, unknown=unknown)
    assert 0 <= more <= max(0, LIMIT - produced)


def test_of_many_answers_most_need_no_more_than_expected() -> None:
    """Lengths as in the wild: most short, some long, all below a limit that nobody reaches."""
    chance = random.Random(1)
    known = seen([min(999, int(chance.expovariate(1 / 150))) for _ in range(500)])
    expected = known.remaining(0, LIMIT, unknown=0.5)
    answers = [min(999, int(chance.expovariate(1 / 150))) for _ in range(500)]
    assert 0.6 < sum(a <= expected for a in answers) / 500 < 0.8
    assert expected < 0.3 * LIMIT

"""Numbers of instances that are to join: lent, used, and given back."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.control.leases import LEASE_S, Leases
from tests.support.mock_instance import MODEL

OTHER = msgspec.structs.replace(MODEL, layers=5)


def test_those_who_never_come_use_up_nothing() -> None:
    leases = Leases(2, 10)
    assert [leases.take(OTHER, 0.0, ()) for _ in range(9)] == [*range(2, 10), None]
    leases.use(4)
    assert leases.take(MODEL, LEASE_S, ()) is None
    again = [leases.take(MODEL, LEASE_S + 1, {5}) for _ in range(7)]
    assert again == [2, 3, 6, 7, 8, 9, None]


def test_only_who_has_come_binds_the_others() -> None:
    leases = Leases(0, 10)
    junk, first = leases.take(OTHER, 0.0, ()), leases.take(MODEL, 0.0, ())
    assert junk == 0
    assert first == 1
    assert leases.model is None
    leases.use(first)
    assert leases.model == MODEL
    assert leases.admits(first)
    assert not leases.admits(junk)
    leases.give_back(first)
    assert leases.model is None
    assert leases.admits(junk)


def test_what_the_cluster_was_launched_with_stays() -> None:
    leases = Leases(0, 10, MODEL)
    number = leases.take(OTHER, 0.0, ())
    assert number is not None
    leases.use(number)
    assert leases.model == MODEL
    assert not leases.admits(number)


@given(st.lists(st.tuples(st.sampled_from(["take", "use", "leave"]), st.integers(0, 6),
                          st.floats(0, 2 * LEASE_S)), max_size=60))  # fmt: skip
def test_no_number_is_lent_twice(steps: list[tuple[str, int, float]]) -> None:
    leases, now = Leases(0, 5), 0.0
    lent: dict[int, float] = {}
    here: set[int] = set()
    for what, number, later in steps:
        now += later
        if what == "take":
            taken = leases.take(MODEL, now, here)
            lent = {n: ends for n, ends in lent.items() if ends >= now or n in here}
            assert (taken is None) == (len(lent) == 5)
            if taken is not None:
                assert taken not in lent
                lent[taken] = now + LEASE_S
        elif what == "use" and lent.get(number, -1.0) >= now:
            leases.use(number)
            here.add(number)
        elif what == "leave" and number in here:
            leases.give_back(number)
            here.remove(number)
            del lent[number]

"""Who is guilty is found, nobody else is, and nobody is tried for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.execution.suspects import STEPS_ON_TRIAL, Suspects

MEMBERS = 12


@given(
    guilty=st.sets(st.integers(0, MEMBERS - 1)),
    together=st.sets(st.integers(0, MEMBERS - 1), min_size=1),
    ending=st.sets(st.integers(0, MEMBERS - 1)),
)
def test_the_guilty_are_found_and_nobody_else(
    guilty: set[int], together: set[int], ending: set[int]
) -> None:
    """All of a group run in each step; some end by themselves as soon as they have made one."""
    suspects: Suspects[int] = Suspects()
    there = set(range(MEMBERS))
    found: set[int] = set()
    assert suspects.failed(sorted(together)) is None
    for _ in range(100):
        if not suspects:
            break
        running = sorted(m for m in there if suspects.may_run(m))
        if guilty & set(running):
            culprit = suspects.failed(running)
            if culprit is not None:
                found.add(culprit)
                there.remove(culprit)
        else:
            suspects.passed(running)
            there -= ending & set(running)
        suspects.keep(there.__contains__)
    assert not suspects
    assert found == guilty & together
    assert all(suspects.may_run(m) for m in range(MEMBERS))


def test_the_one_that_is_alone_in_a_failure_gets_a_second_try() -> None:
    suspects: Suspects[str] = Suspects()
    assert suspects.failed(["a"]) is None
    assert suspects.may_run("a")
    assert not suspects.may_run("b")
    for _ in range(STEPS_ON_TRIAL - 1):
        assert not suspects.passed(["a"])
    assert suspects.passed(["a"])
    assert suspects.may_run("b")


def test_steps_of_others_clear_nobody() -> None:
    suspects: Suspects[str] = Suspects()
    suspects.failed(["a", "b"])
    assert not any(suspects.passed(["c"]) for _ in range(2 * STEPS_ON_TRIAL))
    assert suspects.failed(["c", "a"]) == "a"
    assert suspects.may_run("b")
    assert not suspects.may_run("c")

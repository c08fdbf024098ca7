"""The demo's bursts: short of memory on any machine, and over in minutes."""

from __future__ import annotations

from functools import partial

import pytest

from benchmark.sizing import PROMPT_LEN, Pace, sized

TWO = partial(Pace, instances=2, slots=2600, batch=9)
FAST = TWO(alone_ms=8.0, together_ms=14.0, prompt_ms=60.0)
USUAL = TWO(alone_ms=60.0, together_ms=140.0, prompt_ms=1200.0)
SLOW = TWO(alone_ms=200.0, together_ms=340.0, prompt_ms=3000.0)
PACES = pytest.mark.parametrize("pace", [FAST, USUAL, SLOW], ids=["fast", "usual", "slow"])


@PACES
def test_all_of_them_ask_for_twice_the_memory_before_one_has_ended(pace: Pace) -> None:
    sizes = sized(pace)
    asked = sizes.requests * (PROMPT_LEN + sizes.output_len)
    assert asked == pytest.approx(2 * pace.slots, rel=0.05)
    assert sizes.burst_s < sizes.output_len * pace.alone_ms / 1e3


@PACES
def test_it_is_over_in_minutes(pace: Pace) -> None:
    sizes = sized(pace)
    assert sizes.answer_s <= 40
    assert sizes.before_s + sizes.burst_s + sizes.after_s <= 80


@PACES
def test_long_prompts_come_twice_as_fast_as_two_instances_compute_them(pace: Pace) -> None:
    sizes = sized(pace)
    computed_s = sizes.long_prompts * pace.prompt_ms / 1e3 / 2
    assert computed_s == pytest.approx(2 * sizes.long_prompts_s)


def test_a_slow_machine_gets_more_and_shorter_answers() -> None:
    usual, slow = sized(USUAL), sized(SLOW)
    assert slow.output_len < usual.output_len
    assert slow.requests > usual.requests


def test_what_is_short_is_said() -> None:
    assert "memory is short, and computing is not short" in str(sized(USUAL))
    bound = TWO(alone_ms=20.0, together_ms=140.0, prompt_ms=900.0)
    assert "computing is short" in str(sized(bound))


def test_more_requests_on_demand() -> None:
    assert sized(USUAL, scale=2.0).requests == 2 * sized(USUAL).requests

"""When a request is late for its first token."""

from __future__ import annotations

import pytest

from kunserve_sglang.core.first_token import FirstTokenLimit


@pytest.mark.parametrize(
    ("waited_ms", "past"), [(0, False), (400, False), (600, True), (2900, True), (3100, False)]
)
def test_late_from_when_there_is_no_hope_until_patience_ends(waited_ms: float, past: bool) -> None:
    assert FirstTokenLimit(ms=1000.0).past(10, waited_ms) is past


def test_longer_prompts_get_more_time_unless_all_get_the_same() -> None:
    grows = FirstTokenLimit(ms=1000.0, tokens=512)
    assert grows.of(1) == grows.of(512) == 1000.0
    assert grows.of(1024) == 2000.0
    assert FirstTokenLimit(ms=1000.0).of(100_000) == 1000.0


def test_without_a_limit_nobody_is_late() -> None:
    assert not any(FirstTokenLimit().past(10, waited) for waited in (0, 1, 1e9))

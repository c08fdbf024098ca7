"""What happens in a long run, what is found to grow in it, and whether books balance."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from benchmark.endurance.books import imbalances, leftovers
from benchmark.endurance.census import Life
from benchmark.endurance.flatness import slope
from benchmark.endurance.happenings import APART_S, Happening, happenings
from benchmark.endurance.report import _flat, slopes_of, warm_at
from benchmark.endurance.soak import Story
from benchmark.faults.cells import Transition

HOUR = 3600.0


# -- what happens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_run_of_twenty_minutes_has_everything_in_order_and_never_two_at_once(seed: int) -> None:
    found = list(happenings(1200.0, random.Random(seed)))
    at = [when for when, _ in found]
    assert at == sorted(at)
    assert at[0] > 0
    assert at[-1] <= 1200.0
    assert all(later - before >= APART_S - 1e-9 for before, later in pairwise(at))
    assert {kind for _, kind in found} == set(Happening)
    assert 60 <= sum(kind is Happening.CHANGE for _, kind in found) <= 180


def test_the_same_seed_brings_the_same() -> None:
    first, second, other = (list(happenings(600.0, random.Random(seed))) for seed in (3, 3, 4))
    assert first == second != other


# -- what grows ------------------------------------------------------------------------------------


def _life(level: float, per_hour: float, seconds: int, noise: float, seed: int) -> list[Any]:
    chance = random.Random(seed)
    return [
        (float(t), level + per_hour * t / HOUR + chance.gauss(0, noise))
        for t in range(0, seconds, 5)
    ]


def after(seconds: float) -> Callable[[float], float]:
    """Samples of a life count from then on."""
    return lambda began: began + seconds


@pytest.mark.parametrize("per_hour", [-3.0, 0.0, 40.0])
def test_a_slope_is_found_in_lives_of_different_levels(per_hour: float) -> None:
    lives = {n: _life(100.0 * n, per_hour, 900, 0.5, n) for n in range(1, 4)}
    found = slope(lives, after(100.0))
    assert found is not None
    assert abs(found.per_hour - per_hour) < 4 * found.error
    assert found.error < 1.5
    assert found.lives == 3
    assert found.surely == pytest.approx(max(0.0, found.per_hour - 2 * found.error))


def test_errors_are_as_large_as_they_should_be() -> None:
    """A slope that is not there seems to be there by chance once in forty times on either side."""
    sure = 0
    for seed in range(400):
        found = slope({0: _life(50.0, 0.0, 1200, 2.0, seed)}, after(0.0))
        assert found is not None
        sure += found.surely > 0
    assert 1 <= sure <= 30


def test_what_a_process_takes_at_its_start_is_no_growth() -> None:
    start = [(float(t), float(t)) for t in range(0, 100, 5)]
    later = [(float(t), 100.0) for t in range(100, 400, 5)]
    found = slope({0: start + later}, after(100.0))
    assert found is not None
    assert found.per_hour == pytest.approx(0.0, abs=1e-6)
    grows = slope({0: start + later}, after(0.0))
    assert grows is not None
    assert grows.surely > 0


def test_a_process_counts_when_it_has_been_in_a_group_and_left_it() -> None:
    done = [
        (50.0, Transition.RESTORE, "committed"),
        (60.0, Transition.DROP, "aborted"),
        (70.0, Transition.DROP, "committed"),
        (90.0, Transition.RESTORE, "committed"),
    ]
    story = Story(done=[(at, str(kind), what) for at, kind, what in done])
    assert warm_at(story, 40.0, 5.0) == 90.0
    assert warm_at(story, 40.0, 120.0) == 160.0
    assert warm_at(story, 75.0, 5.0) == math.inf


@pytest.mark.parametrize("seconds", [0, 5, 45])
def test_too_little_says_nothing(seconds: int) -> None:
    assert slope({0: _life(1.0, 0.0, seconds, 0.1, 0)}, after(0.0)) is None
    assert slope({}, after(0.0)) is None


def test_slopes_are_by_role_and_measure() -> None:
    leaks = {Life("router", 1, 0.0): _life(50.0, 600.0, 600, 0.1, 1)}
    keeps = {Life("server", n, 0.0): _life(70.0, 0.0, 600, 0.1, n) for n in (2, 3)}
    found = slopes_of({"private_mib": {**leaks, **keeps}, "files": {}}, after(60.0))
    assert set(found) == {("router", "private_mib"), ("server", "private_mib")}
    assert found["router", "private_mib"].surely > 500
    assert found["server", "private_mib"].per_hour < 10


@pytest.mark.parametrize(
    ("mib_per_hour", "minutes", "ok"), [(3, 20, True), (30, 20, False), (8, 120, False)]
)
def test_growth_counts_by_the_time_of_the_run(
    mib_per_hour: float, minutes: float, ok: bool
) -> None:
    lives = {Life("router", 1, 0.0): _life(50.0, mib_per_hour, int(60 * minutes), 0.1, 1)}
    (found,) = slopes_of({"private_mib": lives}, after(60.0)).values()
    assert _flat("router", "private_mib", found, minutes / 60)["ok"] == ok
    files = {Life("router", 1, 0.0): [(float(t), 20.0 + t // 300) for t in range(0, 1200, 5)]}
    (more,) = slopes_of({"files": files}, after(0.0)).values()
    assert not _flat("router", "files", more, 1 / 3)["ok"]


# -- books -----------------------------------------------------------------------------------------


def _instance(group: tuple[int, ...], layers: tuple[int, int], **other: Any) -> Any:
    return {
        "mode": "cooperative" if len(group) > 1 else "independent",
        "group": list(group),
        "layers": list(layers),
        "layer_count": 6,
        "epoch": 4,
        "pages": {"parameters": 60, "kv": 30, "free": 10, "total": 100},
        "slots": {"used": 5, "cached": 20, "capacity": 30},
        "in_flight": 0,
        "running": 0,
        "waiting": 0,
    } | other


def test_books_that_balance() -> None:
    alone = _instance((0,), (0, 6))
    pair = {1: _instance((1, 2), (0, 2)), 2: _instance((1, 2), (2, 6))}
    assert imbalances({0: alone, **pair}) == []
    new = {"mode": "unknown", "in_flight": 0}
    assert imbalances({0: new}) == []


@pytest.mark.parametrize(
    ("amiss", "said"),
    [
        ({"pages": {"parameters": 60, "kv": 31, "free": 10, "total": 100}}, "pages"),
        ({"pages": {"parameters": 60, "kv": 29, "free": 10, "total": 100}}, "pages"),
        ({"slots": {"used": 11, "cached": 20, "capacity": 30}}, "slots"),
        ({"slots": {"used": -1, "cached": 20, "capacity": 30}}, "slots"),
        ({"layers": [3, 6]}, "layers"),
        ({"layers": [1, 6]}, "layers"),
    ],
)
def test_books_that_do_not_balance(amiss: dict[str, Any], said: str) -> None:
    pair = {1: _instance((1, 2), (0, 2)), 2: _instance((1, 2), (2, 6)) | amiss}
    (line,) = imbalances(pair)
    assert said in line


def test_a_group_that_is_changing_is_not_judged() -> None:
    pair = {1: _instance((1, 2), (0, 2)), 2: _instance((1, 2), (0, 6), epoch=5)}
    assert imbalances(pair) == []
    del pair[1]
    assert imbalances(pair) == []


def test_what_is_left_over() -> None:
    idle = _instance((0,), (0, 6), slots={"used": 0, "cached": 3, "capacity": 30})
    assert leftovers({0: idle}) == []
    assert leftovers({0: idle | {"in_flight": 1}}) == ["instance 0 still has 1 in_flight"]
    (line,) = leftovers({0: _instance((0,), (0, 6))})
    assert "5 slots" in line

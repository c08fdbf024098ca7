"""What is decided about instances is done to the right ones."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import cast

import pytest

from kunserve_sglang.api.types import ClusterStatus, InstanceStatus
from kunserve_sglang.core.messages import Mode
from kunserve_sglang.launch import keeper as module
from kunserve_sglang.launch.console import Console
from kunserve_sglang.launch.fleet import Fleet, Used
from kunserve_sglang.launch.keeper import Keeper
from kunserve_sglang.launch.restarts import MAX_DELAY_S


class Fallible(Fleet):
    """Two instances without processes: the first dies whenever it is started."""

    def __init__(self) -> None:
        super().__init__("", Console())
        self.alive = {1}
        self.gone: set[int] = set()
        self.restarted: list[int] = []
        self.asked: list[int] = []
        self.used_s = 0.0
        self.read_bytes = 0

    @property
    def numbers(self) -> set[int]:
        return {0, 1}

    @property
    def running(self) -> set[int]:
        return self.alive

    @property
    def left(self) -> set[int]:
        return self.gone

    def url(self, number: int) -> str:
        return f"http://{number}"

    def restart(self, number: int) -> None:
        self.restarted.append(number)

    def used(self, number: int) -> Used:  # noqa: ARG002 (all do the same)
        return Used(self.used_s, self.read_bytes)

    def show_stacks(self, number: int) -> None:
        assert number not in self.asked

    def ask(self, number: int) -> None:
        self.asked.append(number)

    def kill(self, number: int) -> None:
        assert number in self.asked


def test_one_that_dies_again_and_again_is_given_up_and_the_other_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0.0, MAX_DELAY_S + 1)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    fleet = Fallible()
    keeper = Keeper(fleet, 3, Console())
    for _ in range(20):
        keeper.look(None)
    assert fleet.restarted == [0, 0, 0]
    said = " ".join(capsys.readouterr().err.split())
    assert "instance 0 has ended again after 3 restarts (--restart-limit): it is given up" in said
    assert said.count("given up") == 1
    assert not keeper.done
    fleet.alive = set()
    fleet.gone = {1}
    assert keeper.done


def test_without_restarts_all_is_over_when_none_runs() -> None:
    fleet = Fallible()
    keeper = Keeper(fleet, 0, Console())
    keeper.look(None)
    assert not keeper.done
    fleet.alive = set()
    assert keeper.done
    assert fleet.restarted == []


@pytest.mark.parametrize(("share", "ended"), [(0.02, True), (0.9, False)])
def test_only_one_that_does_nothing_is_ended(
    monkeypatch: pytest.MonkeyPatch, *, share: float, ended: bool
) -> None:
    """A step may take longer than any limit, and all that while its instance says nothing."""
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    fleet = Fallible()
    fleet.alive = {0, 1}
    keeper = Keeper(fleet, 3, Console())
    seen = InstanceStatus(
        id=1,
        url=fleet.url(1),
        mode=Mode.INDEPENDENT,
        serving=True,
        in_flight=1,
        stalled=True,
    )
    status = cast(ClusterStatus, SimpleNamespace(instances=[seen]))
    for second in range(200):
        fleet.used_s = second * share
        fleet.read_bytes = second  # as one that has answered may, whatever its scheduler does
        keeper.look(status)
    assert fleet.asked == ([1] if ended else [])


@pytest.mark.parametrize(
    ("share", "read", "answers", "ended"),
    [
        (0.0, 0, True, True),
        (0.0, 4096, True, False),
        (0.05, 0, True, False),
        (0.0, 0, False, False),
    ],
    ids=["hangs", "reads slowly", "computes a little", "nobody knows"],
)
def test_one_that_gets_nowhere_while_it_starts_is_started_again(
    monkeypatch: pytest.MonkeyPatch, *, share: float, read: int, answers: bool, ended: bool
) -> None:
    """It has said nothing to the router yet, and what it does is to be seen by its process only."""
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    fleet = Fallible()
    keeper = Keeper(fleet, 3, Console())
    status = cast(ClusterStatus, SimpleNamespace(instances=[])) if answers else None
    for second in range(200):
        fleet.alive = {0, 1} - set(fleet.asked[:1])
        fleet.used_s, fleet.read_bytes = second * share, second * read
        keeper.look(status)
        if fleet.restarted:
            break
        assert set(fleet.asked) == keeper.ending
    assert bool(fleet.asked) == ended
    assert fleet.restarted[:1] == fleet.asked[:1]

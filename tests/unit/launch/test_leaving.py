"""What becomes of instances whose launcher ends, as the router is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from kunserve_sglang.api.client import RouterClient
from kunserve_sglang.api.errors import Refused, Unreachable
from kunserve_sglang.launch import instance as module
from kunserve_sglang.launch.fleet import Fleet
from kunserve_sglang.launch.instance import Joiner
from kunserve_sglang.launch.options import JoinOptions


class Router:
    """Knows some instances, and refuses to let go of one that it takes for alive."""

    def __init__(self, known: set[int], *, refusals: int = 0, away: bool = False) -> None:
        self.known, self._refusals, self._away = known, refusals, away

    def call(self, name: str, path: dict[str, str] | None = None, **_: Any) -> Any:
        if self._away:
            raise Unreachable("nobody is there")
        if name == "workers":
            workers = [SimpleNamespace(id=number) for number in sorted(self.known)]
            return SimpleNamespace(read=lambda _: SimpleNamespace(workers=workers))
        assert (name, path) == ("drain", {"id": "3"})
        if self._refusals:
            self._refusals -= 1
            raise Refused("it is still there")
        self.known.discard(3)
        return None


class Ended(Fleet):
    """Two instances: the second has left, and the first has ended in another way."""

    numbers = {3, 4}  # type: ignore[assignment] # noqa: RUF012
    left = {4}  # type: ignore[assignment] # noqa: RUF012

    def ask_to_end(self, *_: object) -> None: ...

    def end(self) -> None: ...


def stopped(router: Router) -> None:
    """A launcher of these instances has ended."""
    joiner = Joiner(cast(RouterClient, router), JoinOptions(router="http://r"), [])
    joiner._fleet = Ended("", joiner._console)
    joiner._stop()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_INTERVAL_S", 0.01)


def test_the_router_forgets_what_has_ended_without_leaving() -> None:
    router = Router({1, 3}, refusals=2)
    stopped(router)
    assert router.known == {1}


def test_nothing_is_forgotten_that_was_not_known() -> None:
    router = Router({1})
    stopped(router)
    assert router.known == {1}


def test_a_router_that_is_away_holds_nobody_up() -> None:
    stopped(Router({1, 3}, away=True))

"""How soon the router notices that a host does not answer any more. In virtual time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import NamedTuple

import aiohttp
import pytest

from kunserve_sglang.control import health
from kunserve_sglang.control.health import HealthWatch
from kunserve_sglang.control.liveness import Liveness, LivenessState
from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.control.upstream import CONNECT_TIMEOUT_S, Question, Reply, open_session
from kunserve_sglang.testing.mock_member import hello
from tests.support.model.clock import VirtualLoop

NOTICED_S = 5.0
_REPORT_S = 0.2
_LOOK_S = 0.05
_STEP_S = 1.0


class Host:
    """One instance on it: its processes say nothing from `busy_at` on, and nobody does from
    `gone_at` on, until it is back. Before it says that it is well, some step has to end."""

    def __init__(self, busy_at: float, gone_at: float, back_at: float = math.inf) -> None:
        self._busy_at = busy_at
        self._gone_at = gone_at
        self._back_at = back_at

    def _is_there(self, now: float) -> bool:
        return not self._gone_at <= now < self._back_at

    async def answer(
        self,
        _session: aiohttp.ClientSession,
        _instance: Instance,
        question: Question,
        timeout_s: float,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        read_timeout_s: float | None = None,
    ) -> Reply:
        """Takes the place of `ask`: the kernel takes connections while the host is there.

        Times for connection and answer must not run out together, whatever keeps the router: then
        it would not know which of them is missing.
        """
        assert connect_timeout_s + (read_timeout_s or 0.0) < timeout_s
        asked_at = asyncio.get_running_loop().time()
        if not self._is_there(asked_at):
            await asyncio.sleep(connect_timeout_s)
            return Reply(instance=0, error="could not be reached", unreachable=True)
        answered_at = asked_at + (_STEP_S if question.path == "/health" else 0.0)
        busy = self._busy_at <= answered_at < self._back_at
        if busy or not self._is_there(answered_at):
            await asyncio.sleep(read_timeout_s or timeout_s)
            return Reply(instance=0, error="did not answer")
        await asyncio.sleep(answered_at - asked_at)
        return Reply(instance=0, status=200)

    async def report(self, known: Liveness) -> None:
        now = asyncio.get_running_loop().time
        while now() < self._busy_at:
            known.reports(now())
            await asyncio.sleep(_REPORT_S)


class Seen(NamedTuple):
    """When an instance was lost and when it was back, in seconds; and what it was then."""

    lost_at: float
    back_at: float
    state: LivenessState


async def seen_of(host: Host, until_s: float) -> Seen:
    """Watch it so long; what never happens is so at infinity."""
    now = asyncio.get_running_loop().time
    registry = Registry(1, None, now)
    registry.hello(hello(0, "http://x"))
    known = registry.instances[0].liveness
    known.serves()
    lost_at = back_at = math.inf
    state = known.state
    async with open_session() as session:
        tasks = [
            asyncio.create_task(HealthWatch(registry, session, None).run()),
            asyncio.create_task(host.report(known)),
        ]
        for _ in range(int(until_s / _LOOK_S)):
            if known.lost and lost_at == math.inf:
                lost_at, state = now(), known.state
            if known.alive and lost_at < now() and back_at == math.inf:
                back_at = now()
            await asyncio.sleep(_LOOK_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Seen(lost_at, back_at, state)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        yield runner


@pytest.mark.parametrize("busy_s", [0.0, 0.9, 2.0, 4.0, 9.0])
@pytest.mark.parametrize("gone_at", [20.0 + 0.35 * n for n in range(12)])
def test_a_host_that_vanishes_is_noticed_whatever_it_is_being_asked(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, busy_s: float, gone_at: float
) -> None:
    host = Host(gone_at - busy_s, gone_at)
    monkeypatch.setattr(health, "ask", host.answer)
    seen = runner.run(seen_of(host, gone_at + 30))
    assert seen.state is LivenessState.UNREACHABLE
    assert seen.lost_at - gone_at < NOTICED_S


@pytest.mark.parametrize("gone_at", [20.0 + 0.35 * n for n in range(20)])
def test_one_that_is_back_serves_again_whatever_it_was_asked(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, gone_at: float
) -> None:
    """Also if its health was being asked when it vanished: there is no answer to that any more."""
    back_at = gone_at + 15.0
    host = Host(gone_at, gone_at, back_at)
    monkeypatch.setattr(health, "ask", host.answer)
    seen = runner.run(seen_of(host, back_at + 40))
    assert seen.lost_at < back_at
    assert seen.back_at - back_at < NOTICED_S


def test_a_process_that_stands_still_is_not_taken_for_dead(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(busy_at=20.0, gone_at=math.inf)
    monkeypatch.setattr(health, "ask", host.answer)
    seen = runner.run(seen_of(host, 75.0))
    assert seen.lost_at == math.inf

"""How soon the router notices that a host does not answer any more. In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

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


class Host:
    """One instance on it: its processes are busy from `busy_at`, and it is gone from `gone_at`."""

    def __init__(self, busy_at: float, gone_at: float) -> None:
        self._busy_at = busy_at
        self._gone_at = gone_at

    async def answer(
        self,
        _session: aiohttp.ClientSession,
        _instance: Instance,
        _question: Question,
        timeout_s: float,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        read_timeout_s: float | None = None,
    ) -> Reply:
        """Takes the place of `ask`: the kernel takes connections while the host is there.

        Times for connection and answer must not run out together, whatever keeps the router: then
        it would not know which of them is missing.
        """
        assert connect_timeout_s + (read_timeout_s or 0.0) < timeout_s
        now = asyncio.get_running_loop().time
        if now() >= self._gone_at:
            await asyncio.sleep(connect_timeout_s)
            return Reply(instance=0, error="could not be reached", unreachable=True)
        if now() >= self._busy_at:
            await asyncio.sleep(read_timeout_s or timeout_s)
            return Reply(instance=0, error="did not answer")
        return Reply(instance=0, status=200)

    async def report(self, known: Liveness) -> None:
        now = asyncio.get_running_loop().time
        while now() < self._busy_at:
            known.reports(now())
            await asyncio.sleep(_REPORT_S)


async def seen_of(host: Host, until_s: float) -> tuple[float, Instance]:
    """When the instance was lost, in seconds, or `until_s`; and what it was then."""
    now = asyncio.get_running_loop().time
    registry = Registry(1, None, now)
    registry.hello(hello(0, "http://x"))
    instance = registry.instances[0]
    instance.liveness.serves()
    async with open_session() as session:
        tasks = [
            asyncio.create_task(HealthWatch(registry, session, None).run()),
            asyncio.create_task(host.report(instance.liveness)),
        ]
        for _ in range(int((until_s - now()) / _LOOK_S)):
            if instance.liveness.lost:
                break
            await asyncio.sleep(_LOOK_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return now(), instance


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
    lost_at, instance = runner.run(seen_of(host, gone_at + 60))
    assert instance.liveness.state is LivenessState.UNREACHABLE
    assert lost_at - gone_at < NOTICED_S


def test_a_process_that_stands_still_is_not_taken_for_dead(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(busy_at=20.0, gone_at=1000.0)
    monkeypatch.setattr(health, "ask", host.answer)
    _, instance = runner.run(seen_of(host, 75.0))
    assert instance.liveness.alive

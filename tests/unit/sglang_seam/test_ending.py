"""An instance that was asked to end does so when nothing is under way, and not before."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from kunserve_sglang.sglang_seam.ending import end_promptly


class Manager(SimpleNamespace):
    """As much of SGLang's as is looked at; `under_way` is what it had when SGLang went on."""

    gracefully_exit: bool
    rid_to_state: dict[str, object]
    under_way: list[str] | None

    async def sigterm_watchdog(self) -> None:
        assert self.gracefully_exit
        self.under_way = list(self.rid_to_state)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Manager:
    monkeypatch.setattr("kunserve_sglang.sglang_seam.ending._INTERVAL_S", 0.001)
    monkeypatch.setattr("kunserve_sglang.sglang_seam.ending._SGLANG_INTERVAL_S", 0.05)
    manager = Manager(gracefully_exit=False, rid_to_state={"one": object()}, under_way=None)
    end_promptly(manager)
    return manager


def test_it_waits_until_it_was_asked_and_for_what_is_under_way(manager: Manager) -> None:
    async def asked() -> None:
        watching = asyncio.create_task(manager.sigterm_watchdog())
        await asyncio.sleep(0.01)
        assert not watching.done()
        manager.gracefully_exit = True
        await asyncio.sleep(0.005)
        assert not watching.done()
        manager.rid_to_state.clear()
        await watching

    asyncio.run(asyncio.wait_for(asked(), 10))
    assert manager.under_way == []


def test_what_takes_long_is_left_to_sglang(manager: Manager) -> None:
    manager.gracefully_exit = True
    asyncio.run(asyncio.wait_for(manager.sigterm_watchdog(), 10))
    assert manager.under_way == ["one"]

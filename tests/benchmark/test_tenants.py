"""The benchmark of tenants: virtual time, and each case in short."""

from __future__ import annotations

import asyncio

import pytest

from benchmark.tenants import CASES, Case, all_checks, measure
from benchmark.virtual_time import VirtualTimeLoop


def test_time_passes_at_once_and_in_order() -> None:
    seen: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((name, asyncio.get_running_loop().time()))

    async def both() -> None:
        await asyncio.gather(sleeper("late", 5000.0), sleeper("early", 0.5))

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(both())
    assert [name for name, _ in seen] == ["early", "late"]
    assert [at for _, at in seen] == pytest.approx([0.5, 5000.0])


def test_who_waits_for_nothing_is_told() -> None:
    loop = VirtualTimeLoop()
    waiting = loop.create_task(asyncio.Event().wait())
    with pytest.raises(RuntimeError, match="nobody will ever wake up"):
        loop.run_until_complete(waiting)
    waiting.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_case_is_the_same_each_time(case: Case) -> None:
    row = measure(case, 5.0, [1])
    assert row["tokens_per_s"] > 0
    assert ("requests" in row) == case.calm
    assert measure(case, 5.0, [1]) == row


def test_checks_say_what_has_to_hold() -> None:
    rows = {c.name: {"case": c.name, "tokens_per_s": 100, "ttft_p99_ms": 100} for c in CASES}
    rows["flood, nobody told apart"]["ttft_p99_ms"] = 900
    rows["two floods, weights 3 to 1"]["ratio"] = 3
    assert all(found["ok"] for found in all_checks(rows))
    rows["flood, tenants"]["ttft_p99_ms"] = 140
    assert [c["value"] for c in all_checks(rows) if not c["ok"]] == [1.4]

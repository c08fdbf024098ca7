"""Faults on purpose in a real cluster: its launcher passes them on, and makes up for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from kunserve_sglang.testing.cluster import Cluster, ClusterOptions, log_tail
from tests.integration.conftest import BUDGET, FLAGS, Client
from tests.integration.test_losses import PROMPTS, STREAMS, plain
from tests.support.waiting import until

ILL = 1
WHAT = "transition.mapped:crash:1"

wait_for = partial(until, timeout_s=300.0, poll_s=0.1)
pytestmark = pytest.mark.timeout(900)


def test_an_instance_ends_in_the_middle_of_a_drop(model: Path, tmp_path: Path) -> None:
    """All answers are the same, and whoever comes in its place takes part in the next drop."""
    options = ClusterOptions(
        model_path=model,
        memory_budget=BUDGET,
        overload_policy="none",
        kunserve_flags=("--dispatch", "round_robin", "--checksums"),
        sglang_flags=FLAGS,
    )
    log, asks = tmp_path / "log", (plain, *STREAMS)
    suffering = Cluster(options.command, log, environment={"KUNSERVE_FAULT": f"{WHAT}:{ILL}"})
    with suffering as cluster, ThreadPoolExecutor(len(asks)) as pool:
        client = Client(cluster.url)
        expected = list(pool.map(lambda ask: ask(client, PROMPTS[0]), asks))
        answers = [pool.submit(ask, client, PROMPTS[0]) for ask in asks]
        wait_for(
            lambda: all(i["running"] for i in client.status()["instances"]), about=client.status
        )
        _, event = client.call("POST", "/kunserve/drop", {})
        assert event.get("status") == "failed", event
        assert [answer.result(120) for answer in answers] == expected
        assert log.read_text().count(f"fault on purpose: {WHAT}") == 1
        wait_for(
            lambda: client.call("GET", "/readiness")[1].get("available") == 2,
            about=lambda: f"{client.status()}\n{log_tail(log)}",
        )
        wait_for(lambda: client.modes() == {"independent"}, about=client.status)
        client.drop()
        assert list(pool.map(lambda ask: ask(client, PROMPTS[0]), asks)) == expected
        client.wait_until_idle()
        client.restore()

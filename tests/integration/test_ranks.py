"""A real cluster whose instances have two ranks each.

The model is a tiny one: the heads of the other cannot be divided by two.
"""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from kunserve_sglang.testing.cluster import Cluster, ClusterOptions, log_tail
from tests.integration.conftest import Client
from tests.integration.test_losses import family_of
from tests.support.leftovers import (
    files_in_shared_memory,
    held_in_shared_memory,
    wait_until_nothing_is_left,
)
from tests.support.streams import REQUESTS, Streams
from tests.support.waiting import until

FLAGS = ("--tp-size=2", "--dtype=float32", "--skip-tokenizer-init", "--context-length=1024")
DEAD = 1


def test_two_ranks_an_instance(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same tokens in all modes; an instance ends with any of its ranks; nothing is left behind."""
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    shared_before = files_in_shared_memory()
    options = ClusterOptions(
        model_path=tiny_model,
        memory_budget="6MiB",
        overload_policy="none",
        sglang_flags=FLAGS,
        kunserve_flags=("--dispatch", "round_robin", "--checksums"),
    )
    log = tmp_path / "log"
    with Cluster(options.command, log) as cluster, ThreadPoolExecutor(REQUESTS) as pool:
        client = Client(cluster.url)
        expected = Streams(client, pool).tokens()
        running = Streams(client, pool)
        running.wait_until_all_run()
        client.drop()
        assert running.tokens() == expected
        assert Streams(client, pool).tokens() == expected
        client.wait_until_idle()
        client.restore()
        assert Streams(client, pool).tokens() == expected

        client.drop()
        family = family_of(cluster.pid, client.status()["instances"][DEAD]["url"])
        (rank,) = (p for p in family if p.name().endswith("scheduler_TP1"))
        rank.kill()
        until(
            lambda: client.modes() == {"independent", "dead"},
            30,
            poll_s=0.05,
            about=client.status,
        )
        assert Streams(client, pool).tokens() == expected

        launcher = psutil.Process(cluster.pid)
        family += [launcher, *launcher.children(recursive=True)]
        known = {*shared_before, *held_in_shared_memory(except_by=[p.pid for p in family])}
        launcher.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive, (alive, log_tail(log))

    wait_until_nothing_is_left(temporary, known)

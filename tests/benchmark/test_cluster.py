"""Clusters as subprocesses, with small programs in the launcher's place."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from kunserve_sglang.testing.cluster import Cluster, ClusterError, ClusterOptions

READY = (
    "print('KunServe is ready: http://127.0.0.1:' + sys.argv[1] + '  (2 instances)', flush=True)"
)
CHILD = "subprocess.Popen(['sleep', '600'], start_new_session=True)"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def cluster(log: Path, *lines: str, ready: float = 30.0, stop: float = 10.0) -> Cluster:
    program = "\n".join(["import signal, subprocess, sys, time", *lines])
    return Cluster(
        lambda port: [sys.executable, "-c", program, str(port)],
        log,
        ready_timeout_s=ready,
        stop_timeout_s=stop,
    )


def children() -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


def test_it_serves_between_entry_and_exit(tmp_path: Path) -> None:
    waited: list[float] = []
    running = cluster(tmp_path / "logs" / "a.log", "time.sleep(0.5)", READY, "time.sleep(600)")
    running._on_wait = waited.append
    before = children()

    with running as entered:
        assert entered.url.startswith("http://127.0.0.1:")
        assert len(children()) == len(before) + 1
        entered.check_running()

    assert children() == before
    assert waited


@pytest.mark.parametrize("lines", [[], [DEAF]])
def test_everything_it_started_ends(tmp_path: Path, lines: list[str]) -> None:
    before = {p.pid for p in children()}
    with cluster(tmp_path / "a.log", *lines, CHILD, READY, "time.sleep(600)", stop=0.5):
        started = [p for p in children() if p.pid not in before]

    assert len(started) == 2
    assert not any(p.is_running() for p in started)


def test_an_early_end_shows_the_log(tmp_path: Path) -> None:
    failing = cluster(tmp_path / "a.log", "print('no such flag', flush=True)", "sys.exit(2)")

    with pytest.raises(ClusterError, match=r"ended with status 2(?s:.*)no such flag"):
        failing.__enter__()


def test_a_late_end_shows_the_log(tmp_path: Path) -> None:
    with cluster(tmp_path / "a.log", READY, "print('out of memory', flush=True)") as short:
        assert short._process is not None
        short._process.wait(30)
        with pytest.raises(ClusterError, match=r"ended with status 0(?s:.*)out of memory"):
            short.check_running()


def test_waiting_is_bounded(tmp_path: Path) -> None:
    before = children()
    slow = cluster(tmp_path / "a.log", "time.sleep(600)", ready=0.5)

    with pytest.raises(ClusterError, match="not ready within"):
        slow.__enter__()
    assert children() == before


def test_it_ends_with_its_owner(tmp_path: Path) -> None:
    """Even if the owner is killed."""
    log = tmp_path / "a.log"
    pid = os.fork()
    if pid == 0:
        with cluster(log, "import os", "print(os.getpid(), flush=True)", READY, "time.sleep(600)"):
            os._exit(0)
    os.waitpid(pid, 0)
    launcher = int(log.read_text().split()[0])

    deadline = time.monotonic() + 10
    while psutil.pid_exists(launcher) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(launcher) or psutil.Process(launcher).status() == "zombie"


def test_options_become_the_launchers_flags() -> None:
    options = ClusterOptions(
        model_path=Path("m"),
        memory_budget="448MiB",
        overload_policy="drop",
        sglang_flags=("--chunked-prefill-size", "256"),
    )
    command = options.command(31000)

    assert command[1:3] == ["-m", "kunserve_sglang.launch_server"]
    for pair in (
        ["--num-instances", "2"],
        ["--memory-budget", "448MiB"],
        ["--overload-policy", "drop"],
        ["--port", "31000"],
        ["--chunked-prefill-size", "256"],
    ):
        assert " ".join(pair) in " ".join(command)

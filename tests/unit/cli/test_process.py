"""The command line as a process: Ctrl-C, terminals, pipes, and what it imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.mock_worker import Canned, MockWorker
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

START_S = 30.0
"""For a process to start on a machine that is busy with other things."""


@contextmanager
def process(*words: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """`kunserve` with these words; ended at the end, whatever happens."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "kunserve_sglang.cli", *words]
    started = subprocess.Popen(command, env=environment, **options)
    try:
        yield started
    finally:
        started.kill()
        started.wait(30)


class Output:
    """A file that a process writes to, and what is in it by now."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "output"
        self.file = self._path.open("wb")

    @property
    def lines(self) -> list[str]:
        return self._path.read_text().splitlines()

    def __contains__(self, text: str) -> bool:
        return text in self._path.read_text()


def interrupt(started: subprocess.Popen[bytes]) -> int:
    started.send_signal(signal.SIGINT)
    return started.wait(30)


def test_events_are_followed_until_ctrl_c(router: RouterCluster, tmp_path: Path) -> None:
    for path in ("drop", "restore"):
        assert router.post(f"/kunserve/{path}").json["status"] == "committed"
        until(lambda: len({i["epoch"] for i in router.status()["instances"]}) == 1)
    output = Output(tmp_path)
    words = ("events", "--follow", "--limit=1", "--interval=0.02", "--json")
    url = f"--url=127.0.0.1:{router.port}"
    with process(url, *words, stdout=output.file, stderr=subprocess.PIPE) as started:
        until(lambda: output.lines, START_S)
        router.post("/kunserve/drop")
        until(lambda: len(output.lines) == 2)
        assert interrupt(started) == 0
        assert started.stderr is not None
        assert started.stderr.read() == b""
    events = [json.loads(line) for line in output.lines]
    assert events == router.get("/kunserve/events?limit=2").json["events"]


def test_watch_redraws_on_a_terminal_until_ctrl_c(router: RouterCluster) -> None:
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    drawn = b""

    def shows(text: bytes) -> bool:
        nonlocal drawn
        try:
            drawn += os.read(ours, 1 << 16)
        except BlockingIOError:
            return text in drawn
        return text in drawn

    environment_width = {"COLUMNS": "160", "LINES": "40", "TERM": "xterm-256color"}
    words = ("watch", "--interval=0.02", f"--url=127.0.0.1:{router.port}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment_width.items():
            patch.setenv(name, value)
        patch.delenv("NO_COLOR", raising=False)
        with process(*words, stdout=theirs, stderr=subprocess.PIPE) as started:
            until(lambda: shows(b"independent"), START_S)
            assert b"cooperative" not in drawn
            router.post("/kunserve/drop")
            until(lambda: shows(b"cooperative"))
            assert b"\x1b[?25l" in drawn
            assert interrupt(started) == 0
            assert started.stderr is not None
            assert started.stderr.read() == b""
            until(lambda: shows(b"\x1b[?25h"))
    os.close(ours)
    os.close(theirs)


def test_watch_waits_for_a_router_that_restarts(
    idle_router: RouterCluster, worker: MockWorker, tmp_path: Path
) -> None:
    status = idle_router.status()
    worker.answers["/kunserve/status"] = Canned(status)
    output = Output(tmp_path)
    words = ("watch", "--interval=0.02", "--url", worker.url)
    with process(*words, stdout=output.file) as started:
        until(lambda: "epoch 0" in output, START_S)
        worker.stop()
        until(lambda: "trying again" in output)
        worker.answers["/kunserve/status"] = Canned({**status, "epoch": 77})
        worker.start()
        until(lambda: "epoch 77" in output)
        assert interrupt(started) == 0


def test_a_reader_that_has_enough_is_no_error(idle_router: RouterCluster) -> None:
    for form in ((), ("--json",)):
        read, write = os.pipe()
        os.close(read)
        words = ("status", f"--url=127.0.0.1:{idle_router.port}", *form)
        with process(*words, stdout=write, stderr=subprocess.PIPE) as started:
            _, errors = started.communicate(timeout=START_S)
        os.close(write)
        assert (started.returncode, errors) == (0, b"")


def test_it_starts_without_a_serving_runtime(idle_router: RouterCluster) -> None:
    program = (
        "import sys; from kunserve_sglang.cli import main; "
        f"status = main(['status', '--url=127.0.0.1:{idle_router.port}']); "
        "heavy = {'torch', 'sglang', 'numpy', 'zmq', 'aiohttp', 'starlette'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")

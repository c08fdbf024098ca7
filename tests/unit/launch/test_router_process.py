"""A router that dies is started again, and nobody who connects meanwhile is turned away."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.processes import free_port
from kunserve_sglang.launch import router_process as module
from kunserve_sglang.launch.console import Console
from kunserve_sglang.launch.router_process import RouterProcess
from kunserve_sglang.router.settings import RouterConfig
from tests.support.mock_worker import MockWorker
from tests.support.router_harness import Client
from tests.support.waiting import until
from tests.unit.router.test_joining import MODEL

JOIN = {"model": msgspec.to_builtins(MODEL)}
_START_S = 30.0


class Launcher:
    """`launch_server` without instances, and what it says."""

    def __init__(self, *flags: str, port: int | None = None, **environment: str) -> None:
        self.client = Client(port or free_port())
        self._said: list[str] = []
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "kunserve_sglang.launch_server", "--num-instances", "0"),
                *("--port", str(self.client.port), *flags),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                **environment,
            },
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self._said.extend(self.process.stdout)

    @property
    def said(self) -> str:
        return "".join(self._said)

    @property
    def router(self) -> psutil.Process:
        """Raises `ValueError` if there is none."""
        children = psutil.Process(self.process.pid).children()
        (router,) = [c for c in children if any("kunserve::router" in w for w in c.cmdline())]
        return router

    def ready(self, times: int = 1) -> None:
        """A router listens, for the `times`th time, and the launcher knows of the first."""
        until(
            lambda: self.said.count("router at") >= times and "KunServe is ready" in self.said,
            _START_S,
            about=lambda: self.said,
        )

    def ends(self) -> int:
        status = self.process.wait(_START_S)
        self._reader.join(_START_S)
        return status

    def close(self) -> None:
        self.process.terminate()
        self.ends()


@pytest.fixture
def launchers() -> Iterator[list[Launcher]]:
    started: list[Launcher] = []
    yield started
    for launcher in started:
        launcher.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short name: sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="ks-") as name:
        yield Path(name)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_comes_back_with_what_it_was_told(
    launchers: list[Launcher], folder: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(folder))
    launcher = Launcher()
    launchers.append(launcher)
    launcher.ready()
    launcher.client.post("/workers", {"url": "http://127.0.0.1:9"})
    policy = launcher.client.put("/kunserve/policy", {"auto": False, "drop": 0.7}).json
    (state,) = folder.glob("kunserve-*/router.json")
    until(lambda: '"drop":0.7' in state.read_text())
    before = launcher.router
    before.send_signal(number)
    before.wait(_START_S)
    if number == signal.SIGKILL:
        # Whoever connects now waits for the next one.
        assert launcher.client.get("/kunserve/policy").json == policy
    launcher.ready(2)
    assert launcher.client.get("/kunserve/policy").json == policy
    assert [w["id"] for w in launcher.client.get("/workers").json["workers"]] == [1000]
    assert launcher.router.pid != before.pid
    assert "starting the router again (1 of 5)" in launcher.said
    launcher.process.terminate()
    assert launcher.ends() == 0
    with pytest.raises(ConnectionRefusedError):
        launcher.client.get("/liveness")


def test_a_fault_on_purpose_happens_to_the_first_only(
    launchers: list[Launcher], worker: MockWorker
) -> None:
    launchers.append(launcher := Launcher(KUNSERVE_FAULT="proxy.sent:crash:1"))
    launcher.ready()
    assert launcher.client.post("/workers", {"url": worker.url}).status == 201
    until(lambda: launcher.client.get("/readiness").status == 200)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        launcher.client.post("/v1/completions", {"prompt": "x"})
    launcher.ready(times=2)
    until(lambda: launcher.client.get("/readiness").status == 200)
    for _ in range(2):
        assert launcher.client.post("/v1/completions", {"prompt": "x"}).status == 200
    assert "fault on purpose: proxy.sent:crash:1" in launcher.said


@pytest.mark.parametrize("grace_s", [60.0, 0.1])
def test_answers_under_way_have_their_grace(
    launchers: list[Launcher], worker: MockWorker, grace_s: float
) -> None:
    launchers.append(launcher := Launcher("--stop-grace-s", str(grace_s)))
    launcher.ready()
    assert launcher.client.post("/workers", {"url": worker.url}).status == 201
    until(lambda: launcher.client.get("/readiness").status == 200)
    waiting = launcher.client.open("POST", "/generate", {"text": "x", "stream": True})
    until(lambda: worker.streams == 1)
    worker.emit(b"data: 1\n\n")
    stream = waiting.getresponse()
    assert stream.readline() == b"data: 1\n"
    launcher.process.terminate()
    until(lambda: refuses(launcher))
    if grace_s > 1:
        assert launcher.process.poll() is None
        worker.emit(b"data: 2\n\n")
        worker.finish()
        assert stream.read() == b"\ndata: 2\n\n"
    else:
        with pytest.raises(http.client.IncompleteRead) as cut:
            stream.read()
        assert b"router_stopping" in cut.value.partial
    assert launcher.ends() == 0


def test_a_second_signal_waits_for_no_answer(launchers: list[Launcher], worker: MockWorker) -> None:
    launchers.append(launcher := Launcher("--stop-grace-s", "3600"))
    launcher.ready()
    assert launcher.client.post("/workers", {"url": worker.url}).status == 201
    until(lambda: launcher.client.get("/readiness").status == 200)
    waiting = launcher.client.open("POST", "/generate", {"text": "x", "stream": True})
    until(lambda: worker.streams == 1)
    launcher.process.terminate()
    until(lambda: refuses(launcher))
    launcher.process.terminate()
    assert launcher.ends() == 0
    waiting.close()


def refuses(launcher: Launcher) -> bool:
    """Whether nobody listens any more."""
    try:
        launcher.client.get("/liveness")
    except ConnectionRefusedError:
        return True
    return False


def test_one_that_always_ends_is_given_up(launchers: list[Launcher]) -> None:
    launcher = Launcher("--restart-limit", "1")
    launchers.append(launcher)
    for times in (1, 2):
        launcher.ready(times)
        router = launcher.router
        router.kill()
        router.wait(_START_S)
    assert launcher.ends() == 1
    assert "the router has ended again after 1 restarts (--restart-limit)" in launcher.said
    assert launcher.said.count("the router ended with status -9") == 2


class Waiting(RouterProcess):
    """A process that does nothing in place of a router."""

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import signal; signal.pause()"], process_group=0
        )


def test_one_that_stands_still_is_ended_and_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    router = Waiting(5, Console())
    router.start(RouterConfig(cluster=ClusterConfig(port=0), control_address="c"))
    process = router._process
    assert process is not None
    try:
        router.look(answered=True)
        router.look(answered=False)
        now = module.STALLED_AFTER_S - 1  # slow is not dead
        router.look(answered=False)
        router.look(answered=True)
        router.look(answered=False)
        assert process.poll() is None
        now += module.STALLED_AFTER_S + 1
        router.look(answered=False)
        assert process.wait(_START_S) == -signal.SIGKILL
        assert "the router stands still: ending it" in capsys.readouterr().err
        router.look(answered=False)
        assert not router.failure
        now += 1
        router.look(answered=False)
        assert router._process is not process
        assert not router.failure
    finally:
        router.end()


def test_a_launcher_finds_what_the_last_one_has_left(
    launchers: list[Launcher], folder: Path
) -> None:
    """However that ended, instances elsewhere know its keys and its address, and it knows them."""
    flags = (
        *("--state-folder", str(folder), "--admin-api-key", "a"),
        *("--control-address", "tcp://127.0.0.1:*"),
    )
    admin = {"Authorization": "Bearer a"}
    first = Launcher(*flags)
    launchers.append(first)
    first.ready()
    joined = first.client.post("/kunserve/join", JOIN, **admin).json
    first.client.post("/workers", {"url": "http://127.0.0.1:9"}, **admin)
    until(lambda: "127.0.0.1:9" in (folder / "router.json").read_text())

    second = Launcher(*flags)
    launchers.append(second)
    assert second.ends() == 2
    assert f"--state-folder {folder}: another launcher uses it" in second.said

    router = first.router
    first.process.kill()
    first.ends()
    router.wait(_START_S)
    third = Launcher(*flags, port=first.client.port)
    launchers.append(third)
    third.ready()
    told = third.client.post("/kunserve/join", JOIN, **admin).json
    assert told.pop("instance") == joined.pop("instance") + 1
    assert told == joined
    assert [w["id"] for w in third.client.get("/workers").json["workers"]] == [1000]


def test_a_state_folder_that_cannot_be_used_is_one_line(
    launchers: list[Launcher], folder: Path
) -> None:
    (folder / "cluster.json").write_text("{")
    for name in (str(folder), "/proc/nowhere"):
        launcher = Launcher("--state-folder", name)
        launchers.append(launcher)
        assert launcher.ends() == 2
        (line,) = launcher.said.splitlines()
        assert f"--state-folder {name}: " in line

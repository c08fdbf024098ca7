"""The router as a process: how it starts, what it refuses to start with, how it ends."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kunserve_sglang.core.choices import OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.router.settings import CLUSTER_ENVIRONMENT, RouterConfig
from tests.support.background import Background
from tests.support.mock_instance import MockInstance
from tests.support.router_harness import Client
from tests.support.waiting import until

SLACK_S = 4.0
"""For a machine that is busy with other things."""


def environment_with(cluster: str | None) -> dict[str, str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    variables.pop(CLUSTER_ENVIRONMENT, None)
    if cluster is not None:
        variables[CLUSTER_ENVIRONMENT] = cluster
    return variables


def start(cluster: str | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "kunserve_sglang.router"],
        env=environment_with(cluster),
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def port() -> Iterator[int]:
    """Reserved until the test ends: bound but not listening, and the router may share it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def config(port: int, folder: Path) -> RouterConfig:
    cluster = ClusterConfig(num_instances=1, port=port, overload_policy=OverloadPolicy.NONE)
    return RouterConfig(cluster=cluster, control_address=f"ipc://{folder}/c")


def answers(client: Client) -> bool:
    try:
        return client.get("/liveness").status == 200
    except ConnectionError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_cuts_what_will_not_end(
    number: signal.Signals, port: int, tmp_path: Path
) -> None:
    """The stream says so, and looks like no whole one."""
    started = config(port, tmp_path)
    background = Background()
    process = start(started.to_environment())
    client = Client(port)
    until(lambda: answers(client), 20)
    title = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert title.startswith(b"kunserve::router")

    instance = MockInstance(0, started.control_address, background)
    until(lambda: client.get("/readiness").status == 200)
    connection = client.open("POST", "/generate", {"stream": True})
    until(lambda: instance.worker.streams)
    instance.worker.emit(b"data: 1\n\n")
    response = connection.getresponse()
    assert response.read1(100) == b"data: 1\n\n"

    asked = time.monotonic()
    process.send_signal(number)
    with pytest.raises(http.client.IncompleteRead) as cut:
        response.read()
    said, nothing = cut.value.partial.removeprefix(b"\n\ndata: ").split(b"\n\n")
    assert (json.loads(said)["error"]["code"], nothing) == ("router_stopping", b"")
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - asked < 3 + SLACK_S
    assert process.returncode == 0
    assert b"Traceback" not in errors
    until(lambda: instance.worker.left == 1)
    connection.close()
    instance.stop()
    background.stop()


def test_an_idle_router_ends_quietly(port: int, tmp_path: Path) -> None:
    process = start(config(port, tmp_path).to_environment())
    client = Client(port)
    until(lambda: answers(client), 20)
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert b"Traceback" not in errors


def test_the_audit_log_is_plain_json_beside_the_other_lines(port: int, tmp_path: Path) -> None:
    process = start(config(port, tmp_path).to_environment())
    client = Client(port)
    until(lambda: answers(client), 20)
    assert client.put("/kunserve/policy", {"drop": 0.9}).status == 200
    process.terminate()
    _, errors = process.communicate(timeout=20)
    (line,) = [line for line in errors.splitlines() if b"kunserve/policy" in line]
    assert json.loads(line)["body"] == {"drop": 0.9}


@pytest.mark.parametrize("environment", [None, "{", '{"cluster": {}}'])
def test_without_a_configuration_it_says_so_in_one_line(environment: str | None) -> None:
    process = start(environment)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    (line,) = errors.splitlines()
    assert CLUSTER_ENVIRONMENT.encode() in line


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(config(port, tmp_path).to_environment())
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    (line,) = errors.splitlines()
    assert f"127.0.0.1:{port}".encode() in line


def test_a_control_address_that_cannot_be_had_is_one_line(port: int, tmp_path: Path) -> None:
    process = start(config(port, tmp_path / "missing").to_environment())
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    (line,) = errors.splitlines()
    assert b"cannot bind" in line


LAUNCHER = """
import os, subprocess, sys, time
import msgspec
from kunserve_sglang.router.settings import CLUSTER_ENVIRONMENT, RouterConfig

config = msgspec.json.decode(sys.argv[1], type=RouterConfig)
config = msgspec.structs.replace(config, launcher=os.getpid())
environment = {**os.environ, CLUSTER_ENVIRONMENT: config.to_environment()}
subprocess.Popen([sys.executable, "-m", "kunserve_sglang.router"], env=environment)
time.sleep(60)
"""


def test_a_router_ends_with_its_launcher(port: int, tmp_path: Path) -> None:
    wanted = config(port, tmp_path)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, wanted.to_environment()], env=environment_with(None)
    )
    client = Client(port)
    until(lambda: answers(client), 20)
    (router,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs([router], timeout=30)
    assert not alive

"""Where a launcher listens, who may know its keys, and what it refuses; with a router alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from kunserve_sglang.core.addresses import http_url
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.processes import die_with_parent, free_port
from tests.support.refusing import refusal
from tests.support.waiting import until

KEYS = ("s3cret-admin", "s3cret-read", "s3cret-api")
EMPTY = ("kunserve_sglang.launch_server", "--num-instances", "0")
"""A launcher without instances."""

JOINING = "kunserve_sglang.launch_instance"


@contextmanager
def launched(log: Path, *flags: str, **environment: str) -> Iterator[psutil.Process]:
    """A launcher without instances, once it says that it is ready."""
    command = [sys.executable, "-m", *EMPTY]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                **environment,
            },
            preexec_fn=partial(die_with_parent, signal.SIGKILL),
        )
    try:
        until(lambda: "KunServe is ready" in log.read_text() or process.poll() is not None, 30)
        assert process.poll() is None, log.read_text()
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        assert process.wait(30) == 0, log.read_text()


def status(url: str, key: str = "") -> Any:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url}/kunserve/status", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


@pytest.mark.parametrize(
    ("host", "found_at"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("::1", ["::1"]),
        ("0.0.0.0", ["127.0.0.1"]),
        ("::", ["::1", "127.0.0.1"]),
    ],
)
def test_it_listens_where_it_is_told_to(tmp_path: Path, host: str, found_at: list[str]) -> None:
    port = free_port()
    log = tmp_path / "log"
    with launched(log, f"--host={host}", f"--port={port}", "--allow-open"):
        assert f"KunServe is ready: {http_url(host, port)} " in log.read_text()
        for address in found_at:
            assert status(http_url(address, port))["instances"] == []


def test_no_process_shows_a_key(tmp_path: Path) -> None:
    admin, read, api = KEYS
    file = tmp_path / "key"
    file.write_text(read)
    words = (f"--admin-api-key={admin}", f"--read-api-key-file={file}", "--api-key", api)
    port = free_port()
    with launched(tmp_path / "log", f"--port={port}", *words) as launcher:
        family = [launcher, *launcher.children(recursive=True)]
        assert len(family) >= 2
        shown = [word for process in family for word in process.cmdline()]
        assert shown
        assert not [word for word in shown if any(key in word for key in KEYS)]
        assert status(http_url("127.0.0.1", port), admin)["instances"] == []


def test_keys_may_come_from_the_environment(tmp_path: Path) -> None:
    admin, read, _ = KEYS
    port = free_port()
    env = {"KUNSERVE_ADMIN_API_KEY": admin, "KUNSERVE_READ_API_KEY": read}
    with launched(tmp_path / "log", f"--port={port}", **env):
        url = http_url("127.0.0.1", port)
        assert status(url, read)["instances"] == []
        with pytest.raises(urllib.error.HTTPError, match="401"):
            status(url)


def test_a_fault_that_cannot_happen_is_refused_in_one_line() -> None:
    line = refusal(*EMPTY, KUNSERVE_FAULT="transition.joined:drop:1")
    assert "KUNSERVE_FAULT=transition.joined:drop:1: what can happen there is crash" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0 is open to others"),
        (("--host", "::"), "--host :: is open to others"),
        (("--host", "::1", "--port", "1", "--tp-size", "2"), "--tp-size: with --num-instances 0"),
        (("--read-api-key", "k"), "--read-api-key needs --admin-api-key"),
        (("--control-bind", "0.0.0.0"), "--control-bind needs --control-address"),
        (("--control-address", "tcp://h:5", "--control-bind", "h"), "--control-bind h: not an"),
        (("--ready-file", "/nowhere/ready"), "--ready-file /nowhere/ready: No such file"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(flags: tuple[str, ...], words: str) -> None:
    assert words in refusal(*EMPTY, *flags)


def test_instances_of_this_host_cannot_stand_behind_a_name() -> None:
    with pytest.raises(ConfigurationError, match="--control-bind needs"):
        ClusterConfig(control_address="tcp://h:5", control_bind="0.0.0.0", num_instances=1)


def test_who_waits_for_a_router_can_be_told_to_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    flags = ("--router", http_url("127.0.0.1", free_port()), "--model-path", "none")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", JOINING, *flags, "--router-wait-s", "60"],
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(die_with_parent, signal.SIGKILL),
        )
    try:
        until(lambda: signal.SIGTERM in caught_by(process.pid), 30)
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
    assert process.wait(30) == 0, log.read_text()


def test_who_waits_for_a_router_gives_up() -> None:
    url = http_url("127.0.0.1", free_port())
    flags = ("--router", url, "--model-path", "none", "--router-wait-s", "0.1")
    command = [sys.executable, "-m", JOINING, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert f"cannot reach {url}" in done.stderr.splitlines()[-1]


def caught_by(pid: int) -> set[int]:
    """The signals that a process has handlers for."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return {number for number in range(1, 65) if caught >> (number - 1) & 1}

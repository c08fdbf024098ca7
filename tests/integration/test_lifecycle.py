"""Starting, ending and refusing: what an operator sees."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kunserve_sglang.testing.cluster import Cluster, ClusterOptions, log_tail
from tests.integration.conftest import BUDGET, FLAGS, Client
from tests.support.leftovers import (
    files_in_shared_memory,
    held_in_shared_memory,
    wait_until_nothing_is_left,
)

LAUNCH = (sys.executable, "-m", "kunserve_sglang.launch_server")


def _refusal(*flags: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and stderr of a launcher that must not start."""
    done = subprocess.run(
        [*LAUNCH, *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--memory-budget", "lots"), "448MiB"),
        (("--restore-threshold", "1.5"), "--restore-threshold"),
        (("--num-instances", "0"), "--num-instances"),
    ],
)
def test_bad_values_are_refused_in_one_line(flags: tuple[str, ...], word: str) -> None:
    status, stderr = _refusal("--model-path", "nowhere", *flags)
    assert status == 2
    lines = [line for line in stderr.splitlines() if line.startswith("kunserve:")]
    assert len(lines) == 1
    assert word in lines[0]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--tp-size", "2"), "--tp-size 2: the model has 9 attention heads"),
        (("--enable-hierarchical-cache",), "--enable-hierarchical-cache"),
        (("--max-total-tokens", "1000"), "--memory-budget"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    model: Path, flags: tuple[str, ...], word: str
) -> None:
    status, stderr = _refusal("--model-path", str(model), "--memory-budget", "640MiB", *flags)
    assert status == 2
    assert word in stderr.splitlines()[-1] or word in stderr


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, stderr = _refusal("--model-path", "nowhere", "--port", str(port))
    assert status == 2
    assert str(port) in stderr


def test_a_budget_below_the_parameters_is_refused(model: Path) -> None:
    status, stderr = _refusal("--model-path", str(model), "--memory-budget", "100MiB")
    assert status == 1
    assert "the parameters alone take" in stderr


@pytest.mark.usefixtures("plain_sglang")
def test_without_the_plugin_an_instance_refuses_to_serve(model: Path) -> None:
    """SGLang only logs a plugin that fails; a cluster of plain SGLangs must not start.

    Without the plugin no budget holds, and SGLang would write zeros to nearly all of the host's
    memory, or to the part that it is told here: so it must be found out before.
    """
    status, stderr = _refusal(
        *("--model-path", str(model)),
        *("--memory-budget", BUDGET),
        *("--num-instances", "1"),
        *("--mem-fraction-static", "0.1"),
        env={"SGLANG_PLUGINS": "none"},
    )
    assert status == 1
    assert "the KunServe plugin did not take effect in its main process" in stderr


# Processes of other tests that are killed leave semaphores, which nobody could tell from its own.
@pytest.mark.undisturbed
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind(
    model: Path, tmp_path: Path, end: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    shared_before = files_in_shared_memory()
    options = ClusterOptions(
        model_path=model,
        memory_budget=BUDGET,
        overload_policy="drop-always",
        sglang_flags=FLAGS,
        kunserve_flags=("--checksums",),
    )
    with Cluster(options.command, tmp_path / "log") as cluster:
        client = Client(cluster.url)
        client.drop()
        launcher = psutil.Process(cluster.pid)
        family = [launcher, *launcher.children(recursive=True)]
        assert len(family) >= 8
        known = {*shared_before, *held_in_shared_memory(except_by=[p.pid for p in family])}
        launcher.send_signal(end)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive, (alive, log_tail(tmp_path / "log"))

    wait_until_nothing_is_left(temporary, known)

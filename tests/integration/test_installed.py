"""A server of our wheel, where there is no checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from kunserve_sglang.testing.cluster import Cluster, log_tail
from tests.integration.conftest import Client
from tests.support.installed import Installed


def test_an_instance_of_the_wheel_answers(
    installed: Installed, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(installed.elsewhere)
    log = tmp_path / "log"
    command = [
        *(str(installed.python), "-m", "kunserve_sglang.launch_server"),
        *("--model-path", str(tiny_model), "--num-instances", "1", "--memory-budget", "32MiB"),
        *("--dtype", "float32"),
    ]
    with Cluster(
        lambda port: [*command, "--port", str(port)], log, environment=installed.environment
    ) as cluster:
        client = Client(cluster.url)
        assert client.generate("a", 4)["meta_info"]["completion_tokens"] == 4
        assert [i["mode"] for i in client.status()["instances"]] == ["independent"]
    assert "Traceback" not in log.read_text(), log_tail(log)
    assert list(installed.elsewhere.iterdir()) == []

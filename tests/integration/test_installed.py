"""A server of our wheel, where there is no checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from kunserve_sglang.testing.cluster import Cluster, log_tail
from kunserve_sglang.testing.upstream import unpack_upstream
from tests.integration.conftest import Client
from tests.support.installed import Installed


@pytest.mark.parametrize("sglang", ["fork", "upstream"])
def test_an_instance_of_the_wheel_answers(
    installed: Installed,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sglang: str,
) -> None:
    """In upstream's SGLang as well, with no more than what lets it start on a CPU."""
    environment = installed.environment
    if sglang == "upstream":
        unpack_upstream(tmp_path / "upstream")
        environment["PYTHONPATH"] = str(tmp_path / "upstream")
    monkeypatch.chdir(installed.elsewhere)
    log = tmp_path / "log"
    command = [
        *(str(installed.python), "-m", "kunserve_sglang.launch_server", "--dtype", "float32"),
        *("--model-path", str(tiny_model), "--num-instances", "1", "--memory-budget", "32MiB"),
    ]
    with Cluster(
        lambda port: [*command, "--port", str(port)], log, environment=environment
    ) as cluster:
        client = Client(cluster.url)
        answer = client.generate("a", 4)
        assert answer["meta_info"]["completion_tokens"] == 4
        (instance,) = client.status()["instances"]
        assert instance["mode"] == "independent"
        version = client.call("GET", "/server_info")[1]["version"]
        assert {"fork": "+kunserve", "upstream": "+guards"}[sglang] in version
    assert "Traceback" not in log.read_text(), log_tail(log)
    assert list(installed.elsewhere.iterdir()) == []

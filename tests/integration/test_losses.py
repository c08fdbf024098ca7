"""An instance is killed while its group works: the cluster goes on with the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from kunserve_sglang.testing.cluster import Cluster, ClusterOptions, log_tail
from tests.integration.conftest import BUDGET, FLAGS, Client
from tests.support.waiting import until

PROMPTS = ("The capital of France is", "Once upon a time,", "def quicksort(numbers):")
DEAD = 1


def family_of(launcher: int, url: str) -> list[psutil.Process]:
    """All processes of the instance that listens at `url`."""
    port = int(url.rsplit(":", 1)[1])
    for child in psutil.Process(launcher).children():
        listening = (c for c in child.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
        if any(c.laddr.port == port for c in listening):
            return [child, *child.children(recursive=True)]
    raise AssertionError(f"nobody listens at {url}")


def test_the_cluster_goes_on_with_the_others(model: Path, tmp_path: Path) -> None:
    options = ClusterOptions(
        model_path=model, memory_budget=BUDGET, overload_policy="none", sglang_flags=FLAGS
    )
    log = tmp_path / "log"
    with Cluster(options.command, log) as cluster, ThreadPoolExecutor(8) as pool:
        client = Client(cluster.url)
        expected = [client.generate(prompt, 12)["text"] for prompt in PROMPTS]
        client.drop()
        answers = [pool.submit(_generate, client, PROMPTS[i % 3]) for i in range(8)]
        until(
            lambda: all(i["running"] for i in client.status()["instances"]),
            30,
            poll_s=0.02,
            about=client.status,
        )
        family = family_of(cluster.pid, client.status()["instances"][DEAD]["url"])
        for process in family:
            process.kill()

        ended = [answer.result(60) for answer in answers]
        assert {status for status, _ in ended} == {502, 503}, ended
        assert any("were lost" in str(body) for status, body in ended if status == 503)
        until(
            lambda: client.modes() == {"independent", "dead"},
            30,
            poll_s=0.05,
            about=client.status,
        )
        assert [client.generate(prompt, 12)["text"] for prompt in PROMPTS] == expected
        psutil.wait_procs(family, timeout=30)
        text = log.read_text()
        assert f"instance {DEAD} ended with status -9" in text, log_tail(log)
        assert "Traceback" not in text, log_tail(log)
        assert client.call("DELETE", f"/workers/{DEAD}")[0] == 200
        assert client.modes() == {"independent"}


def _generate(client: Client, prompt: str) -> tuple[int, Any]:
    """More tokens than there will be time for."""
    sampling = {"temperature": 0, "max_new_tokens": 800, "ignore_eos": True}
    return client.call("POST", "/generate", {"text": prompt, "sampling_params": sampling})

"""An instance is killed while its group works, and no request is lost: not even its own."""

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
        model_path=model,
        memory_budget=BUDGET,
        overload_policy="none",
        kunserve_flags=("--restart-limit", "0", "--checksums"),
        sglang_flags=FLAGS,
    )
    log = tmp_path / "log"
    with Cluster(options.command, log) as cluster, ThreadPoolExecutor(8) as pool:
        client = Client(cluster.url)
        expected = [client.generate(prompt, 12)["text"] for prompt in PROMPTS]
        client.drop()
        asked = [(ask, prompt) for prompt in PROMPTS[:2] for ask in (plain, *STREAMS)]
        answers = [pool.submit(ask, client, prompt) for ask, prompt in asked]
        until(
            lambda: all(i["running"] for i in client.status()["instances"]),
            30,
            poll_s=0.02,
            about=client.status,
        )
        family = family_of(cluster.pid, client.status()["instances"][DEAD]["url"])
        for process in family:
            process.kill()

        got = [answer.result(120) for answer in answers]
        until(
            lambda: client.modes() == {"independent", "dead"},
            30,
            poll_s=0.05,
            about=client.status,
        )
        assert [client.generate(prompt, 12)["text"] for prompt in PROMPTS] == expected
        again = [pool.submit(ask, client, prompt) for ask, prompt in asked]
        for (ask, _), answer, undisturbed in zip(asked, got, again, strict=True):
            assert answer == undisturbed.result(120), ask
        metrics = client.call("GET", "/metrics")[1]
        assert "kunserve:streams_resumed_total 0.0" not in metrics
        assert "kunserve:answers_cut_total 0.0" in metrics
        psutil.wait_procs(family, timeout=30)
        text = log.read_text()
        assert f"instance {DEAD} ended with status -9" in text, log_tail(log)
        assert "Traceback" not in text, log_tail(log)
        assert client.call("DELETE", f"/workers/{DEAD}")[0] == 200
        assert client.modes() == {"independent"}


TOKENS = 80
"""So many that they are still running when their instance is lost."""


def plain(client: Client, prompt: str) -> Any:
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    status, answer = client.call(
        "POST", "/generate", {"text": prompt, "sampling_params": sampling, "return_logprob": True}
    )
    assert status == 200, answer
    return answer["text"], answer["output_ids"]


def _stream_generated(client: Client, prompt: str) -> Any:
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    events = list(client.stream("/generate", {"text": prompt, "sampling_params": sampling}))
    assert len({event["meta_info"]["id"] for event in events}) == 1
    lengths = [len(event["output_ids"]) for event in events]
    assert lengths == sorted(set(lengths)), "a token came twice"
    return events[-1]["text"], events[-1]["output_ids"]


def _stream_completed(client: Client, prompt: str) -> Any:
    """With penalties, logprobs and counts."""
    body = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "frequency_penalty": 0.5,
        "temperature": 0,
        "logprobs": 1,
        "stream_options": {"include_usage": True},
    }
    events = list(client.stream("/v1/completions", body))
    assert len({(event["id"], event["created"]) for event in events}) == 1
    choices = [choice for event in events for choice in event["choices"]]
    tokens = [t for choice in choices if choice["logprobs"] for t in choice["logprobs"]["tokens"]]
    assert len(tokens) == TOKENS
    return "".join(choice["text"] for choice in choices), tokens, events[-1]["usage"]


def _stream_chat(client: Client, prompt: str) -> Any:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": prompt}],
        "n": 2,
        "max_completion_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0,
    }
    texts, reasons = ["", ""], []
    for event in client.stream("/v1/chat/completions", body):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
            if choice["finish_reason"]:
                reasons.append(choice["finish_reason"])
    return texts, reasons


STREAMS = (_stream_generated, _stream_completed, _stream_chat)

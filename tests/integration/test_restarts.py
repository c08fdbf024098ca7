"""Instances that die, or stand still for good, are started again and serve as before."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from pathlib import Path

import openai
import psutil
import pytest

from kunserve_sglang.testing.cluster import Cluster, ClusterOptions, log_tail
from tests.integration.conftest import BUDGET, FLAGS, Client
from tests.integration.test_losses import STREAMS, TOKENS, family_of, plain
from tests.support.waiting import until

PROMPTS = ("The capital of France is", "Once upon a time,")
ILL, WELL = 1, 0

wait_for = partial(until, timeout_s=300.0, poll_s=0.1)
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("restarts") / "log"


@pytest.fixture(scope="module")
def launched(model: Path, log: Path) -> Iterator[Cluster]:
    options = ClusterOptions(
        model_path=model,
        memory_budget=BUDGET,
        overload_policy="none",
        kunserve_flags=("--dispatch", "round_robin", "--checksums"),
        sglang_flags=(*FLAGS, "--enable-metrics"),
    )
    with Cluster(options.command, log, ready_timeout_s=400.0) as cluster:
        yield cluster


def texts(client: Client) -> list[str]:
    return [str(client.generate(prompt, 6)["text"]) for prompt in PROMPTS * 2]


def url_of(client: Client, number: int) -> str:
    return str(next(i["url"] for i in client.status()["instances"] if i["id"] == number))


def both_serve(client: Client) -> bool:
    answer = client.call("GET", "/readiness")[1]
    return bool(answer == {"status": "ok", "available": 2, "expected": 2})


def comes_back(client: Client, before: str, log: Path) -> None:
    """The instance that is ill now, as a new process under its old number."""
    wait_for(
        lambda: url_of(client, ILL) != before and both_serve(client),
        about=lambda: f"{client.status()}\n{log_tail(log)}",
    )
    assert [i["id"] for i in client.status()["instances"]] == [0, 1]


def test_one_that_is_killed_comes_back(launched: Cluster, log: Path) -> None:
    client = Client(launched.url)
    expected = texts(client)
    client.drop()
    before = url_of(client, ILL)
    for process in family_of(launched.pid, before):
        process.kill()
    wait_for(lambda: not both_serve(client))
    comes_back(client, before, log)
    assert f"instance {ILL} ended with status -9" in log.read_text()
    assert f"starting instance {ILL} again (1 of 5)" in log.read_text()
    wait_for(lambda: client.modes() == {"independent"}, about=client.status)
    assert texts(client) == expected
    client.drop()
    assert texts(client) == expected
    client.restore()


def test_a_router_that_is_killed_comes_back_to_the_cluster_as_it_was(
    launched: Cluster, log: Path
) -> None:
    """Whoever asks again gets the answer, which is computed once; and nobody is turned away."""
    client = Client(launched.url)
    expected = texts(client)
    client.drop()
    asks = {f"{ask.__name__} {n}": partial(ask, prompt=prompt) for n, ask, prompt in ASKED}
    idle = computed(client)
    undisturbed = {name: ask(client) for name, ask in asks.items()}
    by_themselves = computed(client) - idle
    assert by_themselves["generation_tokens"] >= TOKENS * len(asks)
    wait_for(lambda: client.modes() == {"cooperative"}, about=client.status)
    before = {i["id"]: (i["epoch"], i["group"], i["layers"]) for i in client.status()["instances"]}
    (router,) = (
        p
        for p in psutil.Process(launched.pid).children()
        if any("kunserve::router" in word for word in p.cmdline())
    )
    idle = computed(client)
    with ThreadPoolExecutor(len(asks) + 1) as pool:
        named = {name: Client(launched.url, named=name.replace(" ", "-")) for name in asks}
        lost = [pool.submit(ask, named[name]) for name, ask in asks.items()]
        by_library = pool.submit(chat, launched.url)
        wait_for(lambda: running(client) >= len(asks), about=client.status)
        router.kill()
        router.wait(60)
        for answer in lost:
            assert isinstance(answer.exception(60), (OSError, HTTPException)), answer
        again = {name: pool.submit(ask, named[name]) for name, ask in asks.items()}
        assert {name: answer.result(120) for name, answer in again.items()} == undisturbed
        assert by_library.result(120)
    assert computed(client) - idle == by_themselves + Counter(CHAT)
    assert texts(client) == expected
    assert both_serve(client)
    wait_for(lambda: client.modes() == {"cooperative"}, about=client.status)
    after = {i["id"]: (i["epoch"], i["group"], i["layers"]) for i in client.status()["instances"]}
    assert after == before
    assert "starting the router again (1 of 5)" in log.read_text()
    client.restore()
    assert texts(client) == expected


ASKED = [(n, ask, p) for n, p in enumerate(PROMPTS) for ask in (plain, *STREAMS)]


def running(client: Client) -> int:
    return sum(i["running"] for i in client.status()["instances"])


def computed(client: Client) -> Counter[str]:
    """What instances have done for requests until now."""
    counted: Counter[str] = Counter()
    for line in client.call("GET", "/metrics")[1].splitlines():
        for name in ("num_requests", "generation_tokens"):
            if line.startswith(f"sglang:{name}_total{{"):
                counted[name] += int(float(line.rsplit(" ", 1)[1]))
    return counted


CHAT = {"num_requests": 1, "generation_tokens": TOKENS}


def chat(url: str) -> str:
    """By a library that asks again by itself when its connection breaks."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8) as api:
        answer = api.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": PROMPTS[0]}],
            max_completion_tokens=TOKENS,
            extra_body={"ignore_eos": True},
            extra_headers={"Idempotency-Key": "by-library"},
        )
    return str(answer.choices[0].message.content)


def test_requests_outlive_the_only_instance(model: Path, tmp_path: Path) -> None:
    """What was under way, and what comes meanwhile, waits for its successor."""
    options = ClusterOptions(
        model_path=model,
        memory_budget=BUDGET,
        overload_policy="none",
        num_instances=1,
        sglang_flags=FLAGS,
    )
    log, asks = tmp_path / "log", (plain, *STREAMS)
    with Cluster(options.command, log) as cluster, ThreadPoolExecutor(6) as pool:
        client = Client(cluster.url)
        answers = [pool.submit(ask, client, PROMPTS[0]) for ask in asks]
        wait_for(lambda: client.status()["instances"][0]["running"] >= len(asks))
        for process in family_of(cluster.pid, url_of(client, 0)):
            process.kill()
        wait_for(lambda: client.call("GET", "/readiness")[0] == 503, about=client.status)
        answers.append(pool.submit(plain, client, PROMPTS[1]))
        got = [answer.result(300) for answer in answers]
        for ask, answer in zip(asks, got, strict=False):
            assert answer == ask(client, PROMPTS[0]), f"{ask}\n{log_tail(log)}"
        assert got[-1] == plain(client, PROMPTS[1])
        assert "starting instance 0 again (1 of 5)" in log.read_text()


def test_one_that_stands_still_gets_no_requests_and_comes_back(
    launched: Cluster, log: Path
) -> None:
    client = Client(launched.url)
    expected = texts(client)
    before = url_of(client, ILL)
    scheduler = scheduler_of(family_of(launched.pid, before))
    scheduler.send_signal(signal.SIGSTOP)
    wait_for(lambda: stalled(client, ILL), about=client.status)
    assert not both_serve(client)
    assert texts(client) == expected  # all of them by the other
    comes_back(client, before, log)
    assert f"instance {ILL} stands still: ending it" in log.read_text()
    assert not scheduler.is_running()
    assert texts(client) == expected


def stalled(client: Client, number: int) -> bool:
    return bool(next(i["stalled"] for i in client.status()["instances"] if i["id"] == number))


def scheduler_of(family: list[psutil.Process]) -> psutil.Process:
    (scheduler,) = (p for p in family if any("scheduler" in word for word in p.cmdline()))
    return scheduler

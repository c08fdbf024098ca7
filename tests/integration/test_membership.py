"""Instances that join a running cluster, take part in a drop, and leave again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from kunserve_sglang.core.processes import die_with_parent
from kunserve_sglang.testing.cluster import ClusterOptions, log_tail
from tests.integration.conftest import BUDGET, FLAGS, Client, running
from tests.integration.test_losses import family_of
from tests.support.leftovers import left_in
from tests.support.streams import REQUESTS, Streams
from tests.support.waiting import until

KEY = "one-for-all"
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a kingdom far away,",
    "def quicksort(numbers):",
    "The three laws of thermodynamics say that",
)
READY = re.compile(r"^KunServe instance (\d+) is ready: (\S+)  \(joined \S+\)$", re.MULTILINE)
WAIT_S = 240.0


class Joined:
    """A `launch_instance` as a subprocess, with a folder of its own for what it leaves."""

    def __init__(self, cluster: Client, model: Path, folder: Path, *flags: str) -> None:
        self.log = folder / "log"
        self.temporary = folder / "t"
        self.temporary.mkdir(parents=True)
        words = ["--router", cluster.url, "--admin-api-key", KEY, "--memory-budget", BUDGET]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "kunserve_sglang.launch_instance", *words),
                    *("--model-path", str(model), *FLAGS, *flags),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, signal.SIGTERM),
                env={**os.environ, "TMPDIR": str(self.temporary)},
            )

    def ready(self) -> int:
        """The number of the instance, once it serves."""
        wait_for(lambda: READY.search(self.log.read_text()) or self.process.poll() is not None)
        found = READY.search(self.log.read_text())
        assert found, log_tail(self.log)
        return int(found[1])

    def family(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.send_signal(signal.SIGTERM)  # at once
        self.process.wait(60)


wait_for = partial(until, timeout_s=WAIT_S, poll_s=0.1)


@contextmanager
def joined(cluster: Client, model: Path, folder: Path, *flags: str) -> Iterator[Joined]:
    instance = Joined(cluster, model, folder, *flags)
    try:
        yield instance
    finally:
        instance.end()


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One instance that others can join, on other hosts too."""
    options = ClusterOptions(
        model_path=model,
        memory_budget=BUDGET,
        overload_policy="none",
        num_instances=1,
        kunserve_flags=(
            *("--join-room", "1", "--control-address", "tcp://127.0.0.1:*"),
            "--checksums",
        ),
        # At this level SGLang logs its arguments.
        sglang_flags=(*FLAGS, "--api-key", KEY, "--log-level", "info"),
    )
    with running(options, tmp_path_factory.mktemp("alone"), KEY) as client:
        yield client


def texts(cluster: Client) -> list[str]:
    """Greedy answers to all prompts at once."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda p: str(cluster.generate(p, 24)["text"]), PROMPTS))


def numbers(cluster: Client) -> set[int]:
    return {i["id"] for i in cluster.status()["instances"]}


@pytest.mark.parametrize("where", ["on this host", "on another host"])
def test_one_that_joins_takes_part(alone: Client, model: Path, tmp_path: Path, where: str) -> None:
    expected = texts(alone)
    flags = ("--host-id", "another") if where == "on another host" else ()
    with joined(alone, model, tmp_path, *flags) as instance:
        number = instance.ready()
        assert numbers(alone) == {0, number}
        assert alone.call("GET", "/readiness")[1]["expected"] == 2
        assert texts(alone) == expected
        status, answer = alone.call("POST", "/flush_cache?timeout=10")
        assert status == 200, answer
        alone.drop()
        assert texts(alone) == expected
        foreign = [i["counters"]["micro_batches_foreign"] for i in alone.status()["instances"]]
        assert min(foreign) > 0
        alone.restore()
        assert texts(alone) == expected
        alone.drop()
        status, answer = alone.call("DELETE", f"/workers/{number}")
        assert status == 200, answer
        assert instance.process.wait(60) == 0, log_tail(instance.log)
        assert texts(alone) == expected
    assert numbers(alone) == {0}
    assert f"instance {number} has left" in instance.log.read_text()
    assert "Traceback" not in instance.log.read_text()
    assert not left_in(instance.temporary)


def test_ctrl_c_lets_requests_end(alone: Client, model: Path, tmp_path: Path) -> None:
    tokens = 100  # so many that both are seen to work
    with joined(alone, model, tmp_path) as instance, ThreadPoolExecutor(4) as pool:
        number = instance.ready()
        alone.drop()
        answers = [pool.submit(alone.generate, p, tokens, ignore_eos=True) for p in PROMPTS]
        wait_for(lambda: all(i["running"] for i in alone.status()["instances"]))
        instance.process.send_signal(signal.SIGINT)
        for answer in answers:
            assert answer.result(120)["meta_info"]["completion_tokens"] == tokens
        assert instance.process.wait(60) == 0, log_tail(instance.log)
    assert numbers(alone) == {0}
    assert f"instance {number} has left" in instance.log.read_text()


def test_nothing_is_left_of_one_that_is_killed(alone: Client, model: Path, tmp_path: Path) -> None:
    with joined(alone, model, tmp_path) as instance:
        number = instance.ready()
        family = instance.family()
        instance.process.kill()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
        wait_for(lambda: not left_in(instance.temporary))
    wait_for(lambda: any(i.get("lost") for i in alone.status()["instances"]))
    assert alone.call("DELETE", f"/workers/{number}")[0] == 200
    assert numbers(alone) == {0}


def test_one_that_dies_comes_back_and_leaves_its_streams_to_another(
    alone: Client, model: Path, tmp_path: Path
) -> None:
    expected = texts(alone)
    with joined(alone, model, tmp_path) as instance:
        number = instance.ready()
        alone.drop()
        (before,) = (i["url"] for i in alone.status()["instances"] if i["id"] == number)
        family_of(instance.process.pid, before)[0].kill()

        def back() -> bool:
            (known,) = (i for i in alone.status()["instances"] if i["id"] == number)
            return known["url"] != before and known["serving"]

        wait_for(back)
        wait_for(lambda: alone.modes() == {"independent"})
        assert f"instance {number} ended with status -9" in instance.log.read_text()
        assert texts(alone) == expected
        alone.drop()
        assert texts(alone) == expected
        alone.restore()
        with ThreadPoolExecutor(REQUESTS) as pool:
            undisturbed = Streams(alone, pool).tokens()
            streams = Streams(alone, pool)
            streams.wait_until_all_run()
            path = f"/workers/{number}?migrate=true"
            assert alone.call("DELETE", path)[0] == 200
            assert streams.tokens() == undisturbed
        assert instance.process.wait(60) == 0, log_tail(instance.log)
    assert numbers(alone) == {0}


def membership(cluster: Client, model: Path) -> Any:
    """What an instance is told that asks to join."""
    words = ["--model-path", str(model), *FLAGS]
    code = (
        "import sys, msgspec; from kunserve_sglang.sglang_seam import server, identity;"
        "args = server.parse_server_args(sys.argv[1:], 0, print);"
        "print(msgspec.json.encode(identity.identity_of(args)).decode())"
    )
    env = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1"}
    said = subprocess.check_output([sys.executable, "-c", code, *words], env=env, timeout=WAIT_S)
    body = {"model": json.loads(said.splitlines()[-1])}
    status, answer = cluster.call("POST", "/kunserve/join", body)
    assert status == 200, answer
    return answer


def test_instances_obey_the_router_only(
    alone: Client, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (instance,) = (Client(i["url"], KEY) for i in alone.status()["instances"])
    assert instance.generate(PROMPTS[0], 1)["text"]
    assert Client(instance.url).call("GET", "/model_info")[0] == 401
    for path in ("/flush_cache", "/weights_checker", "/set_trace_level?level=0", "/open_session"):
        assert instance.call("POST", path, {})[0] == 401
        assert instance.call("POST", path.replace("_", "%5F"), {})[0] == 401
    for path in ("/flush_cache", "/set_trace_level?level=0"):
        assert alone.call("POST", path)[0] == 200
    key = membership(alone, model)["instance_admin_key"]
    assert Client(instance.url, key).call("POST", "/flush_cache")[0] == 200
    (log,) = tmp_path_factory.getbasetemp().glob("alone[0-9]/log")
    assert "server_args=" in log.read_text()
    for told in (log.read_text(), *(str(c.call("GET", "/server_info")) for c in (alone, instance))):
        assert key not in told
        assert KEY not in told
    family = psutil.Process().children(recursive=True)
    assert len(family) > 3
    assert not any(key in word for process in family for word in process.cmdline())


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--dtype", "bfloat16"), "dtype: bfloat16 there, float32 here"),
        (("--context-length", "1024"), "context length: 1024 there"),
        (("--admin-api-key", "wrong"), "admin_key_required"),
        (("--api-key", "another"), "--api-key is not the cluster's"),
        (("--router", "http://127.0.0.1:9"), "cannot reach http://127.0.0.1:9"),
        (("--num-instances", "0"), "--num-instances"),
    ],
)
def test_who_does_not_fit_is_refused_in_one_line(
    alone: Client, model: Path, tmp_path: Path, flags: tuple[str, ...], word: str
) -> None:
    with joined(alone, model, tmp_path, *flags) as instance:
        assert instance.process.wait(60) == 2, log_tail(instance.log)
    lines = instance.log.read_text().splitlines()
    (line,) = [x for x in lines if x.startswith("kunserve: ") and not x.endswith(" s")]
    assert word in line
    assert numbers(alone) == {0}
    wait_for(lambda: not left_in(instance.temporary))

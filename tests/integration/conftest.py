"""Real clusters: real processes, real model, HTTP from outside."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kunserve_sglang.testing.cluster import Cluster, ClusterOptions, log_tail
from tests.support.leftovers import files_in_shared_memory, left_in_shared_memory
from tests.support.places import ROOT
from tests.support.waiting import until

# fp32, so that greedy tokens can be compared between modes; 2,900 token slots an instance.
BUDGET = "640MiB"
FLAGS = ("--dtype", "float32", "--chunked-prefill-size", "256")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture
def plain_sglang() -> Iterator[None]:
    """Cleans up behind SGLang without KunServe, which leaves shared memory when it ends."""
    before = files_in_shared_memory()
    yield
    for path in left_in_shared_memory(before):
        if path.match("sglang_loads_*") or path.match("sem.mp-*"):
            path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2-135M-Instruct, cached on this machine."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "get_model.py")],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=600,
    )
    return Path(done.stdout.strip())


@dataclass
class Client:
    """Plain HTTP calls to a router; `named` is the `Idempotency-Key` of all of them."""

    url: str
    key: str = ""
    named: str = ""
    seen: dict[str, Any] = field(default_factory=dict)

    def call(
        self, method: str, path: str, body: Any = None, timeout: float = 120
    ) -> tuple[int, Any]:
        """Status and decoded JSON (or text) of one call."""
        try:
            with self._open(method, path, body, timeout) as answer:
                return answer.status, _decode(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _decode(error.read())

    def stream(self, path: str, body: dict[str, Any], timeout: float = 120) -> Iterator[Any]:
        """The decoded events of one answer, as they come. Raises if it breaks off."""
        with self._open("POST", path, {**body, "stream": True}, timeout) as answer:
            for line in answer:
                if line == b"data: [DONE]\n":
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))
        raise ConnectionError("the stream has no end")

    def generate(self, prompt: str, new_tokens: int, **sampling: Any) -> dict[str, Any]:
        """One greedy completion through `/generate`."""
        body = {
            "text": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, **sampling},
        }
        status, answer = self.call("POST", "/generate", body)
        assert status == 200, answer
        result: dict[str, Any] = answer
        return result

    def status(self) -> dict[str, Any]:
        code, status = self.call("GET", "/kunserve/status")
        assert code == 200
        result: dict[str, Any] = status
        return result

    def modes(self) -> set[str]:
        return {i["mode"] for i in self.status()["instances"]}

    def drop(self) -> dict[str, Any]:
        return self._transition("drop")

    def restore(self) -> dict[str, Any]:
        return self._transition("restore")

    def wait_until_idle(self, timeout: float = 30) -> None:
        """Until no instance runs or queues anything and no slot is held by a request."""

        def idle() -> bool:
            instances = self.status()["instances"]
            return not any(i["running"] + i["waiting"] + i["slots"]["used"] for i in instances)

        until(idle, timeout, poll_s=0.05, about=self.status)

    def _open(self, method: str, path: str, body: Any, timeout: float) -> http.client.HTTPResponse:
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        if self.key:
            request.add_header("Authorization", f"Bearer {self.key}")
        if self.named:
            request.add_header("Idempotency-Key", self.named)
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
        return answer

    def _transition(self, kind: str) -> dict[str, Any]:
        status, event = self.call("POST", f"/kunserve/{kind}", {})
        assert status == 200, event
        assert event["status"] == "committed", event
        result: dict[str, Any] = event
        return result


def _decode(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


@contextmanager
def running(options: ClusterOptions, folder: Path, key: str = "") -> Iterator[Client]:
    """A cluster, whose log must have no traceback when it has ended."""
    log = folder / "log"
    with Cluster(options.command, log) as cluster:
        yield Client(cluster.url, key)
    assert "Traceback" not in log.read_text(), log_tail(log)


@pytest.fixture(scope="session")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Two instances that change their layout only when told to."""
    options = ClusterOptions(
        model_path=model,
        memory_budget=BUDGET,
        overload_policy="none",
        sglang_flags=FLAGS,
        kunserve_flags=("--checksums",),
    )
    with running(options, tmp_path_factory.mktemp("cluster")) as client:
        yield client


@pytest.fixture
def independent(cluster: Client) -> Client:
    """The same, whatever others have left: every instance by itself."""
    if "cooperative" in cluster.modes():
        cluster.restore()
    return cluster


@pytest.fixture(scope="module", params=["before", "during", "after"])
def phase(cluster: Client, request: pytest.FixtureRequest) -> str:
    """Runs a module's tests three times: before, during and after a drop."""
    cooperative = "cooperative" in cluster.modes()
    if request.param == "during" and not cooperative:
        cluster.drop()
    elif request.param != "during" and cooperative:
        cluster.restore()
    return str(request.param)


@pytest.fixture
def same(cluster: Client, phase: str, request: pytest.FixtureRequest) -> Any:
    """Checks that a test sees the same value in all three phases."""
    return partial(_same, cluster, phase, request.node.originalname)


@pytest.fixture
def same_of(cluster: Client, phase: str, request: pytest.FixtureRequest) -> Any:
    """The same, of several values that the test has names for."""

    def check(what: str, value: Any) -> None:
        _same(cluster, phase, f"{request.node.originalname} {what}", value)

    return check


def _same(cluster: Client, phase: str, name: str, value: Any) -> None:
    expected = cluster.seen.setdefault(name, value)
    assert value == expected, f"{phase}: {value!r} != {expected!r}"

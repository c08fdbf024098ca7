"""The life of pods in Kubernetes: join, take part, leave in time, and a router that moves."""

from __future__ import annotations

import itertools
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import render_manifests
from kunserve_sglang.testing.cluster import log_tail
from tests.integration.conftest import BUDGET, FLAGS
from tests.support.manifests import objects, of_kind
from tests.support.network import Network, can_make_networks
from tests.support.pods import Pod
from tests.support.waiting import until

pytestmark = pytest.mark.skipif(not can_make_networks(), reason="needs to make namespaces, as root")

ADMIN, CLIENT = "an-admin", "a-client"
PORT = 31000
PROMPTS = ("The capital of France is", "Once upon a time,", "def quicksort(numbers):")
TOKENS = 24
ROUTER, INSTANCES = "StatefulSet", "Deployment"

wait_for = partial(until, timeout_s=240.0, poll_s=0.2)


class Orchestrator:
    """What Kubernetes does: it runs pods, and says where services lead."""

    def __init__(self, network: Network, folder: Path, model: Path) -> None:
        self.network, self._folder = network, folder
        values = folder / "values.yaml"
        values.write_text(yaml.safe_dump(values_for(model)))
        self._objects = objects(*render_manifests.render(values).values())
        self._volumes = {name: folder / name for name in ("keys", "state", "cache")}
        for path in self._volumes.values():
            path.mkdir()
        self._volumes["models"] = model.parent
        (folder / "keys" / "admin-api-key").write_text(ADMIN)
        (folder / "keys" / "api-key").write_text(CLIENT)
        self._names = folder / "hosts"
        self._count = itertools.count()
        self.pods: list[Pod] = []
        self.service = ""
        """Where clients are led; empty while no router is ready."""

    def start(self, kind: str) -> Pod:
        """One more pod of the workload of this kind."""
        number = next(self._count)
        (workload,) = of_kind(self._objects, kind)
        pod = Pod(
            workload,
            self.network,
            self._folder / f"pod-{number}",
            volumes=self._volumes,
            hosts=self._names,
            cpus=str(number % 2),
        )
        self.pods.append(pod)
        return pod

    def name(self, router: Pod | None) -> None:
        """Let the headless service lead to this one, ready or not."""
        (service,) = (
            s
            for s in of_kind(self._objects, "Service")
            if s["spec"].get("publishNotReadyAddresses")
        )
        line = f"{router.host.address} {service['metadata']['name']}\n" if router else ""
        self._names.write_text(f"127.0.0.1 localhost\n{line}")

    def lead_to(self, router: Pod) -> None:
        """Once it is ready."""
        wait_for(router.ready, about=lambda: log_tail(router.log))
        self.service = f"http://{router.host.address}:{PORT}"


def values_for(model: Path) -> dict[str, Any]:
    return {
        "model": {"path": f"/models/{model.name}", "volume": {"emptyDir": {}}},
        "instances": {
            "memoryBudget": BUDGET,
            "sglangFlags": list(FLAGS),
            "flags": ["--restart-limit=0"],
            "drainSeconds": 120,
        },
        "router": {"port": PORT, "flags": ["--overload-policy=none", "--checksums"]},
    }


class Clients:
    """Ask one thing after the other, wherever the service leads, until they are told to stop."""

    def __init__(self, where: Orchestrator, threads: ThreadPoolExecutor) -> None:
        self._where, self._threads = where, threads
        self._stop = threading.Event()
        self.answers: list[tuple[str, str]] = []
        self.lost: list[str] = []

    def call(self, method: str, path: str, body: Any = None, key: str = CLIENT) -> Any:
        """The answer, as JSON, by a client on the network. Raises `OSError` for anything else."""
        where = self._where.service
        return self._threads.submit(self._call, where, method, path, body, key).result(120)

    def status(self) -> Any:
        return self.call("GET", "/kunserve/status", key=ADMIN)

    def texts(self) -> dict[str, str]:
        return {
            prompt: self.call("POST", "/generate", question(prompt))["text"] for prompt in PROMPTS
        }

    @contextmanager
    def asking(self) -> Iterator[None]:
        """In the background, as long as the block runs."""
        running = [self._threads.submit(self._ask_on, prompt) for prompt in PROMPTS]
        try:
            yield
        finally:
            self._stop.set()
            for each in running:
                each.result(120)

    def _ask_on(self, prompt: str) -> None:
        while not self._stop.is_set():
            if not (where := self._where.service):  # a connection would be refused
                self._stop.wait(0.1)
                continue
            try:
                answer = self._call(where, "POST", "/generate", question(prompt), CLIENT)
                self.answers.append((prompt, answer["text"]))
            except urllib.error.HTTPError as error:
                self.lost.append(f"{prompt}: {error!r} {error.read()!r}")
            except OSError as error:
                self.lost.append(f"{prompt}: {error!r}")

    def _call(self, where: str, method: str, path: str, body: Any, key: str) -> Any:
        request = urllib.request.Request(
            where + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        with urllib.request.urlopen(request, timeout=100) as answer:
            return json.load(answer)


def question(prompt: str) -> dict[str, Any]:
    return {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS}}


@pytest.fixture
def orchestrator(model: Path, tmp_path: Path) -> Iterator[Orchestrator]:
    with Network() as network:
        running = Orchestrator(network, tmp_path, model)
        try:
            yield running
        finally:
            for pod in running.pods:
                pod.kill()


@pytest.mark.timeout(900)
def test_pods_come_and_go_and_nothing_is_lost(orchestrator: Orchestrator) -> None:
    orchestrator.name(None)
    first, second = (orchestrator.start(INSTANCES) for _ in range(2))
    router = orchestrator.start(ROUTER)
    wait_for(router.alive, about=lambda: log_tail(router.log))
    assert not router.ready(), "nobody could answer yet"
    orchestrator.name(router)
    orchestrator.lead_to(router)
    for pod in (first, second):
        wait_for(pod.ready, about=lambda pod=pod: log_tail(pod.log))
    with orchestrator.network.threads(len(PROMPTS) + 1) as threads:
        clients = Clients(orchestrator, threads)
        expected = clients.texts()
        event = clients.call("POST", "/kunserve/drop", {}, ADMIN)
        assert event["status"] == "committed", event
        assert clients.texts() == expected
        with clients.asking():
            # The router moves to another node, with its volume.
            orchestrator.service = ""
            orchestrator.name(None)
            assert router.stop() == 0, log_tail(router.log)
            router = orchestrator.start(ROUTER)
            orchestrator.name(router)
            orchestrator.lead_to(router)
            wait_for(lambda: modes(clients) == ["cooperative"] * 2, about=clients.status)

            # A new version of the instances, one after the other.
            for old in (first, second):
                assert old.stop() == 0, log_tail(old.log)
                assert not old.ready()
                new = orchestrator.start(INSTANCES)
                wait_for(new.ready, about=lambda new=new: log_tail(new.log))
            wait_for(lambda: modes(clients) == ["independent"] * 2, about=clients.status)
    assert clients.lost == []
    assert set(clients.answers) == set(expected.items())
    for pod in orchestrator.pods:
        assert "Traceback" not in pod.log.read_text(), log_tail(pod.log)


def modes(clients: Clients) -> list[str]:
    return [i["mode"] for i in clients.status()["instances"] if i["serving"]]

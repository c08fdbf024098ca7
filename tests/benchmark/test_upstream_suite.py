"""SGLang's kits: which run, how one test ends, and what a run has to show."""

from __future__ import annotations

import ast
import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmark.upstream_disturbance import Disturbance
from benchmark.upstream_suite import AT_REST, DISTURBED, UPSTREAM, Arm, checks, rows
from kunserve_sglang.core.processes import free_port
from kunserve_sglang.testing.upstream_case import KitOutcome, Runner, Server
from kunserve_sglang.testing.upstream_kits import KITS, NOT_RUN
from tests.support.waiting import until

PASSED, FAILED = KitOutcome("passed", 1.0), KitOutcome("failed", 1.0, "why")


def kits_of_the_wheel() -> set[str]:
    """`module.name` of every class with tests, and of every function that is one."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    found = set()
    for path in (Path(spec.origin).parent / "test" / "kits").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            inside = [n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef)]
            is_kit = isinstance(node, ast.ClassDef) and any(n.startswith("test_") for n in inside)
            is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("run_")
            if is_kit or is_test:
                found.add(f"{path.stem}.{node.name}")
    return found


def test_every_kit_runs_or_has_a_reason_not_to() -> None:
    run = {f"{kit.module}.{kit.name}" for kit in KITS}
    assert not run & set(NOT_RUN)
    assert run | set(NOT_RUN) == kits_of_the_wheel()


def test_a_test_fails_or_takes_too_long_or_is_skipped(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "log")
    nobody = Server(f"http://127.0.0.1:{free_port()}", tmp_path)
    contract = next(kit for kit in KITS if kit.name == "BasicAPIContractMixin")
    failed = runner.run(nobody, contract, "test_health", 120.0)
    assert failed.result == "failed"
    assert "refused" in failed.why
    assert "test_health" in (tmp_path / "log").read_text()
    assert runner.run(nobody, contract, "test_health", 0.0).result == "out of time"
    skipping = next(kit for kit in KITS if kit.skipped)
    test, reason = next(iter(skipping.skipped.items()))
    assert runner.run(nobody, skipping, test, 0.0) == KitOutcome("skipped", 0.0, reason)
    assert nobody.poll() == 1


def arms(
    *, at_rest: KitOutcome, disturbed: KitOutcome, held: int = 0, lost: int = 0
) -> dict[str, Arm]:
    done = {"drop committed": 9, "restore committed": 9, "drop no_plan": 2}
    return {
        UPSTREAM: Arm({"A.one": PASSED, "A.two": FAILED}, {}),
        AT_REST: Arm({"A.one": at_rest, "A.two": PASSED}, {}, lost=lost),
        DISTURBED: Arm({"A.one": disturbed, "A.two": FAILED}, done, held=held),
    }


def test_a_row_is_a_test() -> None:
    first, second = rows(arms(at_rest=PASSED, disturbed=FAILED))
    assert (first["kit"], first["test"]) == ("A", "one")
    assert [first[arm] for arm in (UPSTREAM, AT_REST, DISTURBED)] == ["passed", "passed", "failed"]
    assert first["why"] == {DISTURBED: "why"}
    assert second["why"] == {UPSTREAM: "why", DISTURBED: "why"}


@pytest.mark.parametrize(
    ("found", "missed"),
    [
        (arms(at_rest=PASSED, disturbed=PASSED), set()),
        (arms(at_rest=FAILED, disturbed=PASSED), {2}),
        (arms(at_rest=PASSED, disturbed=FAILED), {3}),
        (arms(at_rest=PASSED, disturbed=PASSED, held=5), {3}),
        (arms(at_rest=PASSED, disturbed=PASSED, lost=1), {2}),
    ],
)
def test_what_passes_with_upstream_has_to_pass_with_us(
    found: dict[str, Arm], missed: set[int]
) -> None:
    assert {c.point for c in checks(rows(found), found) if not c.ok} == missed


class Cluster(BaseHTTPRequestHandler):
    """Drops, and restores every other time it is asked."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.asked.append(self.path)
        if self.path.endswith("restore") and self.asked.count(self.path) % 2:
            self._answer(409, {"error": {"code": "no_plan"}})
        else:
            self._answer(200, {"status": "committed"})

    def do_GET(self) -> None:
        dropped = self.asked.count("/kunserve/restore") % 2
        mode = "cooperative" if dropped else "independent"
        self._answer(200, {"instances": [{"mode": mode}]})

    def _answer(self, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Not on standard error."""


@pytest.fixture
def cluster_url() -> Iterator[str]:
    Cluster.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Cluster) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_disturbance_counts_what_it_does_and_ends_at_rest(cluster_url: str) -> None:
    with Disturbance(cluster_url) as disturbance:
        until(lambda: disturbance.ended["drop committed"] >= 2, 20)
    assert disturbance.ended["restore no_plan"] >= 1
    assert Cluster.asked.count("/kunserve/restore") % 2 == 0

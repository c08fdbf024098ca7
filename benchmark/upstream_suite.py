"""SGLang's own test kits against SGLang alone and against a cluster, at rest and while it drops.

`python -m benchmark.upstream_suite` runs the kits that `testing/upstream_kits.py` lists with a
small model in fp32, each test once against a plain server, once against two instances at rest, and
once against the same while they drop and restore all the time. What passes with the plain server
has to pass with ours. It writes `upstream_suite.json` with `rows` (one a test), `not_run` (kits and
the reason of each) and `checks`; exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import time
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from benchmark.checks import Check, at_least, at_most, check_table
from benchmark.program import ROOT, flags_of, run_program, small_model
from benchmark.report import describe_machine, dumps
from benchmark.upstream_disturbance import Disturbance, call, status
from kunserve_sglang.testing.cluster import Cluster, ClusterOptions
from kunserve_sglang.testing.upstream import UpstreamCluster
from kunserve_sglang.testing.upstream_case import KitOutcome, Runner, Server, tests_of
from kunserve_sglang.testing.upstream_kits import KITS, NOT_RUN, Kit

UPSTREAM, AT_REST, DISTURBED = "upstream", "at_rest", "disturbed"
SGLANG_FLAGS = ("--dtype", "float32", "--chunked-prefill-size", "512")
_LEAST_PASSED = 0.5
_LEAST_TRANSITIONS = 5
_IDLE_S = 60.0
_READY_S = 600.0
_PRELOAD = ("benchmark.program", "benchmark.report")

Outcomes = dict[str, KitOutcome]
"""By `kit.test`."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the three runs. `held` are token slots that are in use when nothing runs any more."""

    outcomes: Outcomes
    transitions: Mapping[str, int]
    held: int = 0
    lost: int = 0
    tracebacks: int = 0


def parser() -> argparse.ArgumentParser:
    flags = flags_of("upstream_suite", "SGLang's own test kits against SGLang and a cluster.")
    flags.add_argument("--model-path", type=Path, help="a model folder (default: a small one)")
    flags.add_argument("--memory-budget", default="1GiB", help="parameters + KV an instance")
    flags.add_argument("--kits", nargs="*", help="run only these classes")
    flags.add_argument("--quick", action="store_true", help="run only the most telling tests")
    flags.add_argument("--test-limit-s", type=float, default=180.0, help="time for one test")
    flags.add_argument("--limit-s", type=float, default=1500.0, help="time for all of one run")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    return flags


def main() -> NoReturn:
    flags = parser().parse_args()
    run_program("upstream_suite", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    """Run all, print, write; returns the exit status."""
    model = flags.model_path or small_model()
    flags.output.mkdir(parents=True, exist_ok=True)
    chosen = selected(flags.kits, quick=flags.quick)
    run_tests = _Tests(
        Runner(flags.output / "upstream_suite.log", _PRELOAD), model, chosen, flags, console
    )
    arms, slots = _cluster_arms(run_tests, flags)
    arms[UPSTREAM] = _upstream_arm(run_tests, slots, flags.output)
    found = rows(arms)
    checked = checks(found, arms)
    results: dict[str, Any] = {
        "command": f"python -m benchmark.upstream_suite{' --quick' * flags.quick}",
        "machine": describe_machine(),
        "setup": {
            "model": model.name,
            "memory_budget": flags.memory_budget,
            "slots": slots,
            "sglang_flags": list(SGLANG_FLAGS),
            "test_limit_s": flags.test_limit_s,
            "limit_s": flags.limit_s,
        },
        "rows": found,
        "transitions": arms[DISTURBED].transitions,
        "not_run": NOT_RUN,
        "checks": [asdict(check) for check in checked],
    }
    (flags.output / "upstream_suite.json").write_text(dumps(results))
    console.print(check_table(results["checks"]))
    return 0 if all(check.ok for check in checked) else 1


def selected(kits: Sequence[str] | None, *, quick: bool) -> list[tuple[Kit, str]]:
    """Each kit with each of its tests, in the order of the table."""
    return [
        (kit, test)
        for kit in KITS
        if not kits or kit.name in kits
        for test in (kit.quick if quick else tests_of(kit))
    ]


@dataclass(frozen=True, slots=True)
class _Tests:
    """All that is to be run against a server."""

    runner: Runner
    model: Path
    chosen: Sequence[tuple[Kit, str]]
    flags: argparse.Namespace
    console: Console

    def __call__(self, name: str, url: str, check_running: Callable[[], None]) -> Outcomes:
        """Raises `ClusterError` if the server ends meanwhile."""
        server = Server(url, self.model)
        deadline = time.monotonic() + self.flags.limit_s
        outcomes: Outcomes = {}
        for kit, test in self.chosen:
            left = deadline - time.monotonic()
            if left > 0:
                limit = min(left, self.flags.test_limit_s)
                outcome = self.runner.run(server, kit, test, limit)
            else:
                outcome = KitOutcome("out of time", 0.0, "the time for all tests was over")
            outcomes[f"{kit.name}.{test}"] = outcome
            line = f"{name}: {kit.name}.{test} {outcome.result} {outcome.seconds:.1f} s"
            self.console.print(f"{line} {outcome.why}", style="dim", markup=False, soft_wrap=True)
            check_running()
            if outcome.result in ("failed", "out of time"):
                _clear(url)
        return outcomes


def _cluster_arms(run_tests: _Tests, flags: argparse.Namespace) -> tuple[dict[str, Arm], int]:
    """At rest and disturbed, on one cluster; and the token slots of an instance."""
    options = ClusterOptions(
        model_path=run_tests.model,
        memory_budget=flags.memory_budget,
        overload_policy="none",
        sglang_flags=SGLANG_FLAGS,
    )
    arms: dict[str, Arm] = {}
    log = flags.output / "upstream_suite-cluster.log"
    with Cluster(options.command, log, ready_timeout_s=_READY_S) as cluster:
        slots = min(i["slots"]["capacity"] for i in status(cluster.url)["instances"])
        for name in (AT_REST, DISTURBED):
            before = _tracebacks(log)
            disturbance = Disturbance(cluster.url)
            with disturbance if name == DISTURBED else nullcontext():
                outcomes = run_tests(name, cluster.url, cluster.check_running)
            arms[name] = Arm(
                outcomes,
                disturbance.ended,
                held=_held(cluster.url),
                lost=sum(i["mode"] == "dead" for i in status(cluster.url)["instances"]),
                tracebacks=_tracebacks(log) - before,
            )
    return arms, slots


def _upstream_arm(run_tests: _Tests, slots: int, logs: Path) -> Arm:
    """One plain server of upstream's wheel, without a router."""
    with UpstreamCluster(
        run_tests.model, slots, SGLANG_FLAGS, logs, num_instances=1, ready_timeout_s=_READY_S
    ) as cluster:
        outcomes = run_tests(UPSTREAM, cluster.server_urls[0], cluster.check_running)
    return Arm(outcomes, {})


def rows(arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """One a test: its result in each run, with the seconds, and why where it did not pass."""
    found = []
    for name in arms[UPSTREAM].outcomes:
        kit, _, test = name.partition(".")
        outcomes = {arm: arms[arm].outcomes[name] for arm in (UPSTREAM, AT_REST, DISTURBED)}
        row: dict[str, Any] = {"kit": kit, "test": test}
        row |= {arm: outcome.result for arm, outcome in outcomes.items()}
        row["seconds"] = {arm: round(outcome.seconds, 1) for arm, outcome in outcomes.items()}
        row["why"] = {arm: outcome.why for arm, outcome in outcomes.items() if outcome.why}
        found.append(row)
    return found


def checks(rows: Sequence[Mapping[str, Any]], arms: Mapping[str, Arm]) -> list[Check]:
    """What passes with upstream passes with us; and nothing is left behind."""
    run = [row for row in rows if row[UPSTREAM] != "skipped"]
    passed = sum(row[UPSTREAM] == "passed" for row in run) / max(1, len(run))
    found = [at_least(1, "share of the tests that passes with upstream", passed, _LEAST_PASSED)]
    for point, arm in ((2, AT_REST), (3, DISTURBED)):
        lost = sum(row[UPSTREAM] == "passed" and row[arm] != "passed" for row in rows)
        found += [
            at_most(point, f"tests that pass with upstream, not {_WORDS[arm]}", lost, 0),
            at_most(point, f"token slots held for nothing, {_WORDS[arm]}", arms[arm].held, 0),
            at_most(point, f"instances lost, {_WORDS[arm]}", arms[arm].lost, 0),
            at_most(point, f"tracebacks in the log, {_WORDS[arm]}", arms[arm].tracebacks, 0),
        ]
    done = arms[DISTURBED].transitions
    committed = min(done.get(f"{kind} committed", 0) for kind in ("drop", "restore"))
    found.append(at_least(4, "drops and restores meanwhile, each", committed, _LEAST_TRANSITIONS))
    return found


_WORDS = {AT_REST: "at rest", DISTURBED: "disturbed"}


def _clear(url: str) -> None:
    """Whatever a test that broke off has left: requests under way, a pause."""
    for path, body in (("/continue_generation", b"{}"), ("/abort_request", b'{"abort_all": true}')):
        try:
            call(url, path, body)
        except urllib.error.HTTPError as error:
            error.close()  # the next test shows whether it matters


def _held(url: str) -> int:
    """Token slots of requests that are still in use when there should be none."""
    deadline = time.monotonic() + _IDLE_S
    while True:
        instances = status(url)["instances"]
        held = sum(int(i["slots"]["used"]) for i in instances)
        if not held or time.monotonic() > deadline:
            return held
        time.sleep(0.2)


def _tracebacks(log: Path) -> int:
    return log.read_text(errors="replace").count("Traceback")


if __name__ == "__main__":
    main()

"""`python -m benchmark.faults`: one cluster goes through all faults, and so does upstream SGLang.

It can be run in parts: rows of earlier runs stay in `faults.json`, with the revision that they are
of, and cells that this revision has been through are not run again. Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from benchmark.checks import check_table
from benchmark.faults import rows as made
from benchmark.faults.cells import Cause, Cell, Phase, Target, left_out, matrix
from benchmark.faults.cluster import HOST_NAMES, FaultedCluster, built_model
from benchmark.faults.hosts import Hosts
from benchmark.faults.load import Clients, asks
from benchmark.faults.measures import expected, prefill_s, reload_s
from benchmark.faults.picture import draw, story
from benchmark.faults.trial import Conductor
from benchmark.faults.upstream import run_upstream
from benchmark.program import ROOT, flags_of, run_program
from benchmark.report import describe_machine, dumps


def parser() -> argparse.ArgumentParser:
    flags = flags_of("faults", "What a cluster loses when a part of it fails.")
    for name, kinds in (("targets", Target), ("causes", Cause), ("phases", Phase)):
        values = [str(kind) for kind in kinds]
        flags.add_argument(f"--{name}", nargs="+", choices=values, default=values)
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--minutes", type=float, default=600.0, help="begin no trial after so long")
    flags.add_argument(
        "--rerun", choices=list(made.Rerun), default=made.Rerun.CHANGED, help="what was run already"
    )
    flags.add_argument("--upstream", choices=("no", "also", "only"), default="also")
    flags.add_argument("--tokens", type=int, default=100, help="new tokens of the longest answers")
    flags.add_argument("--answer-s", type=float, default=180.0, help="time for an answer")
    flags.add_argument("--well-s", type=float, default=240.0, help="time to be as before")
    flags.add_argument("--memory-budget", default="64MiB", help="parameters + KV an instance")
    flags.add_argument("--model-path", type=Path, help="a model folder (default: a tiny one)")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    flags.add_argument("--logs", type=Path, default=ROOT / "build" / "faults")
    return flags


def main() -> NoReturn:
    flags = parser().parse_args()
    run_program("faults", lambda console: run(flags, console))


@dataclass(slots=True)
class Results:
    """What is in the file, and how it is written down as trials end."""

    path: Path
    revision: str
    setup: str
    rows: list[made.Row] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, revision: str, setup: str) -> Results:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "faults.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        return cls(path, revision, setup, old.get("rows", []), old.get("measures", {}))

    def add(self, row: made.Row) -> None:
        machine = describe_machine()
        marks = {
            "revision": self.revision,
            "machine": f"{machine['cpu']}, {machine['cores']} cores",
        }
        self.rows = made.merged(self.rows, [row], {**marks, "setup": self.setup})
        self.write()

    def write(self) -> dict[str, Any]:
        measures = self.measures
        results: dict[str, Any] = {
            "command": "python -m benchmark.faults",
            "machine": describe_machine(),
            "measures": measures,
            "checks": [asdict(c) for c in made.checks(self.rows)],
            "recovery": made.recovery(
                self.rows, measures.get("reload_s", 1.0), measures.get("prefill_s", 1.0)
            ),
            "beside_upstream": made.beside_upstream(self.rows),
            "left_out": left_out(),
            "rows": self.rows,
        }
        self.path.write_text(dumps(results))
        return results


def run(flags: argparse.Namespace, console: Console) -> int:
    """Run what is chosen, print, write; returns the exit status."""
    deadline = time.monotonic() + 60 * flags.minutes
    model = flags.model_path or built_model(flags.logs)
    setup = f"{model.name} {flags.memory_budget}, {flags.tokens} tokens"
    results = Results.of(flags.output, revision(), setup)
    chosen = matrix(
        map(Target, flags.targets), map(Cause, flags.causes), map(Phase, flags.phases), flags.seeds
    )
    cells = made.selected_cells(chosen, results.rows, results.revision, made.Rerun(flags.rerun))
    with Hosts(HOST_NAMES) as hosts:
        if hosts.why_not:
            console.print(f"nothing is cut: {hosts.why_not}", style="yellow", markup=False)
        work = _Work(flags, model, hosts, results, console, deadline)
        if flags.upstream != "only":
            work.all(cells)
        if flags.upstream != "no":
            asyncio.run(run_upstream(work.upstream(), results.add, console, deadline))
    written = results.write()
    draw(results.rows, flags.output / "faults.png")
    console.print(check_table(written["checks"]))
    return int(not all(check["ok"] for check in written["checks"]))


@dataclass(frozen=True, slots=True)
class _Work:
    flags: argparse.Namespace
    model: Path
    hosts: Hosts
    results: Results
    console: Console
    deadline: float

    def all(self, cells: Sequence[Cell]) -> None:
        """One cluster after the other goes through what is left, until one has been through all."""
        left = list(cells)
        while left and time.monotonic() < self.deadline:
            cluster = FaultedCluster(
                self.hosts, self.model, self.flags.memory_budget, self.flags.logs
            )
            with cluster:
                left = asyncio.run(self._some(cluster, left))

    async def _some(self, cluster: FaultedCluster, cells: Sequence[Cell]) -> list[Cell]:
        """What is left over when the time is up, or the cluster does not become well any more."""
        loads = {
            kind: asks(self.model, self.flags.tokens, kind) for kind in {c.load for c in cells}
        }
        async with Clients(cluster.url, cluster.key, self.flags.answer_s) as clients:
            wanted = await expected(clients, loads)
            self.results.measures["prefill_s"] = await prefill_s(clients, self.model)
        self.results.measures["reload_s"] = reload_s(self.model)
        conductor = Conductor(cluster, loads, self.flags.answer_s, self.flags.well_s)
        for position, cell in enumerate(cells):
            if time.monotonic() >= self.deadline:
                return []
            if self.hosts.why_not and (cell.cause.is_cut or cell.target is Target.HOST):
                self._tell({"why_not": self.hosts.why_not}, cell)
                continue
            began = time.monotonic()
            trial = await conductor.run(cell)
            row = made.row_of(trial, wanted[cell.load])
            shown = cell.phase is Phase.COOPERATING and not cell.seed and not trial.why_not
            if shown or made.failed(row):
                row["story"] = story(trial)
            self._tell(row, cell, time.monotonic() - began)
            if trial.well_s is None:
                self.console.print(f"{cell}: {trial.unwell}", style="red", markup=False)
                return list(cells[position + 1 :])
        return []

    def _tell(self, row: made.Row, cell: Cell, took_s: float = 0.0) -> None:
        self.results.add({**made.about(made.KUNSERVE, cell), **row})
        hidden = ("system", "target", "cause", "phase", "seed", "waits_s", "story")
        said = {k: v for k, v in row.items() if k not in hidden}
        line = f"{time.strftime('%H:%M:%S')} {cell} ({took_s:.0f} s): {said}"
        self.console.print(line, markup=False, soft_wrap=True)

    def upstream(self) -> dict[str, Any]:
        return {
            "hosts": self.hosts,
            "model": self.model,
            "logs": self.flags.logs,
            "tokens": self.flags.tokens,
            "answer_s": self.flags.answer_s,
            "targets": self.flags.targets,
            "causes": self.flags.causes,
            "known": {
                made.identity(r)
                for r in self.results.rows
                if r["system"] == made.UPSTREAM and self.flags.rerun != made.Rerun.ALWAYS
            },
        }


def revision() -> str:
    """Of the product as it is run: what its folder is called by git, marked if it was changed."""
    git = ("git", "-C", str(ROOT))
    folder = "python/kunserve_sglang"

    def said(*words: str) -> str:
        done = subprocess.run([*git, *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    tree = said("rev-parse", "--short", f"HEAD:{folder}") or "unknown"
    return tree + ("-changed" if said("status", "--porcelain", "--", folder) else "")


if __name__ == "__main__":
    main()

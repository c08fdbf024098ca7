"""Runs checks one after the other, each in a process of its own and for a limited time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.table import Table

from benchmark.gpu.check import Check, Outcome, Status

_LINES_SHOWN = 15


def run_all(
    checks: Iterable[Check], total_s: float, report: Callable[[Outcome], None]
) -> list[Outcome]:
    """Every check gets its own limit, and never more than what is left of `total_s`."""
    deadline = time.monotonic() + total_s
    outcomes = []
    for check in checks:
        outcomes.append(run_one(check, min(check.limit_s, deadline - time.monotonic())))
        report(outcomes[-1])
    return outcomes


def run_one(check: Check, limit_s: float) -> Outcome:
    """Run a check as a child process; whatever becomes of that is an outcome."""
    if limit_s <= 0:
        return Outcome(check.name, Status.NOT_POSSIBLE, reason="the checks before took all time")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcome.json"
        command = [sys.executable, "-m", "benchmark.gpu.one", check.name, str(file)]
        started = time.monotonic()
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            reason = f"ended after {limit_s:.0f} s"
            return Outcome(check.name, Status.OVER_TIME, time.monotonic() - started, reason=reason)
        seconds = time.monotonic() - started
        if not file.exists():
            tail = "\n".join(output.strip().splitlines()[-_LINES_SHOWN:])
            reason = f"exit status {child.returncode}: {tail}"
            return Outcome(check.name, Status.FAILED, seconds, reason=reason)
        found = json.loads(file.read_text())
    return Outcome(
        check.name,
        Status(found["status"]),
        seconds,
        found.get("figures", {}),
        found.get("reason", ""),
    )


def as_table(outcomes: Iterable[Outcome], checks: Iterable[Check]) -> Table:
    """What was checked, how it ended, and what was measured or stood in the way."""
    what = {check.name: check.what for check in checks}
    table = Table()
    for column in ("check", "what", "status"):
        table.add_column(column)
    table.add_column("s", justify="right")
    table.add_column("figures")
    colours = {Status.OK: "green", Status.NOT_POSSIBLE: "yellow"}
    for o in outcomes:
        details = "\n".join(f"{name}: {value:g}" for name, value in o.figures.items()) or o.reason
        status = f"[{colours.get(o.status, 'red')}]{o.status}[/]"
        table.add_row(o.name, what[o.name], status, f"{o.seconds:.1f}", details)
    return table

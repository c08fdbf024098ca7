"""Runs checks one after the other, each in a process of its own and for a limited time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmark.gpu.check import Check, Outcome, Status

_LINES_SHOWN = 15


def run_all(
    checks: Sequence[Check], total_s: float, report: Callable[[Outcome], None]
) -> list[Outcome]:
    """All together take at most `total_s`.

    As long as that is left, every check has its own limit, and what others before it left over.
    """
    deadline = time.monotonic() + total_s
    outcomes = []
    for number, check in enumerate(checks):
        left = deadline - time.monotonic()
        spare = left - sum(later.limit_s for later in checks[number + 1 :])
        outcomes.append(run_one(check, min(left, max(check.limit_s, spare))))
        report(outcomes[-1])
    return outcomes


def run_one(check: Check, limit_s: float) -> Outcome:
    """Run a check as a child process; whatever becomes of that is an outcome.

    One that does not end by itself keeps the figures that it has found until then.
    """
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
            ended = {"status": Status.OVER_TIME, "reason": f"ended after {limit_s:.0f} s"}
        else:
            tail = "\n".join(output.strip().splitlines()[-_LINES_SHOWN:])
            reason = f"exit status {child.returncode}: {tail}"
            ended = {"status": Status.FAILED, "reason": reason}
        seconds = time.monotonic() - started
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return Outcome(
        check.name,
        Status(found.get("status", ended["status"])),
        seconds,
        found.get("figures", {}),
        found.get("limits", []),
        found.get("reason", ended["reason"]),
    )


def as_table(outcomes: Sequence[Outcome], checks: Sequence[Check]) -> Table:
    """What was checked, how it ended, and what was measured or stood in the way."""
    what = {check.name: check.what for check in checks}
    table = Table()
    for column in ("check", "what", "status"):
        table.add_column(column)
    table.add_column("s", justify="right")
    table.add_column("figures")
    colours = {Status.OK: "green", Status.NOT_POSSIBLE: "yellow"}
    for o in outcomes:
        status = f"[{colours.get(o.status, 'red')}]{o.status}[/]"
        table.add_row(o.name, what[o.name], status, f"{o.seconds:.1f}", "\n".join(_details(o)))
    return table


def _details(outcome: Outcome) -> list[str]:
    """Limits first, since they decide."""
    limits = [
        f"[{'green' if m['ok'] else 'red'}]{m['what']}: {m['value']:g} ({m['bar']})[/]"
        for m in outcome.limits
    ]
    figures = [f"{name}: {value:g}" for name, value in outcome.figures.items()]
    return [*limits, *figures, *filter(None, [escape(outcome.reason)])]

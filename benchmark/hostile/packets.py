"""What a member may get on its data socket: the tests of that, with as many packets as are asked.

A whole member is needed, and the tests have one: its stores, its windows, its pipeline.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

from benchmark.program import ROOT

_TESTS = "tests/unit/instance/test_hostile_packets.py"
_KINDS = ("to a member", "over TCP", "through shared memory")
_TIMEOUT_S = 900.0
_SUMMARY = re.compile(r"(\d+) (passed|failed|error)")


def run(count: int, seed: int) -> dict[str, Any]:
    """`count` headers of each of the `kinds`, by a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", _TESTS],
        env={**os.environ, "KUNSERVE_PACKETS": str(count), "KUNSERVE_FIRST_SEED": str(seed)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    found = {what: int(number) for number, what in _SUMMARY.findall(done.stdout)}
    return {
        "headers": count * len(_KINDS),
        "kinds": list(_KINDS),
        "tests": found.get("passed", 0),
        "failed": done.returncode if not found else found.get("failed", 0) + found.get("error", 0),
        "failures": [line for line in done.stdout.splitlines() if line.startswith("FAILED")],
    }

"""`python -m benchmark.gpu.one NAME FILE`: one check, in a process that it may well break."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmark.gpu.check import Bench, Findings
from benchmark.gpu.checks import CHECKS


def main(name: str, file: str) -> None:
    """Run check `name` on GPU 0 and write to `file` what it finds, at last with its outcome."""
    (check,) = (c for c in CHECKS if c.name == name)
    keep_in = Path(file)
    found = Findings(lambda so_far: _write(keep_in, so_far))
    _write(keep_in, found, **check.outcome(Bench.gpu(), found))


def _write(file: Path, found: Findings, **outcome: Any) -> None:
    """At once or not at all: the process may be killed meanwhile."""
    unfinished = file.with_suffix(".new")
    record = {"figures": found.figures, "limits": found.limits, **outcome}
    unfinished.write_text(json.dumps(record))
    unfinished.replace(file)


if __name__ == "__main__":
    main(*sys.argv[1:])

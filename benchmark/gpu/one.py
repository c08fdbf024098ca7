"""`python -m benchmark.gpu.one NAME FILE`: one check, in a process that it may well break."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmark.gpu.check import Bench
from benchmark.gpu.checks import CHECKS


def main(name: str, file: str) -> None:
    """Run check `name` on GPU 0 and write its outcome to `file`."""
    (check,) = (c for c in CHECKS if c.name == name)
    Path(file).write_text(json.dumps(check.outcome(Bench.gpu())))


if __name__ == "__main__":
    main(*sys.argv[1:])

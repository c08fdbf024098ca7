#!/usr/bin/env python3
"""Check and measure what needs a GPU: `--help` says how.

Runs from a checkout, whether the package is installed or not.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Become `python -m benchmark.gpu`."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "benchmark.gpu", *sys.argv[1:]])


if __name__ == "__main__":
    main()

"""`python -m benchmark.gpu`: what `scripts/gpu_check.py` starts."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmark.gpu.check import Outcome, Status
from benchmark.gpu.checks import CHECKS, TOTAL_S
from benchmark.gpu.runner import as_table, run_all
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.memory.cuda_driver import CudaDevice

ROOT = Path(__file__).resolve().parents[2]
_ABOUT = """Check and measure everything that needs a GPU, in at most eight minutes.

Prints a table and writes gpu-<device>-<date>.json. Exit status: 0 nothing failed, 1 something did,
2 there is no GPU here. A check that cannot be made says why.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the checks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=_ABOUT, allow_abbrev=False)
    names = [check.name for check in CHECKS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    flags = parser.parse_args(argv)
    if (why := why_not()) is not None:
        print(f"gpu_check: {why}", file=sys.stderr)
        return 2
    checks = [check for check in CHECKS if not flags.only or check.name in flags.only]
    outcomes = run_all(checks, TOTAL_S, lambda o: print(f"{o.name}: {o.status}", flush=True))
    Console().print(as_table(outcomes, checks))
    machine = describe_gpu()
    print(write(flags.output, machine, outcomes, datetime.datetime.now(datetime.UTC)))
    return int(any(o.status in (Status.FAILED, Status.OVER_TIME) for o in outcomes))


def why_not() -> str | None:
    """Why nothing can be checked here, if so."""
    if not torch.cuda.is_available():
        return f"no CUDA device here that torch {torch.__version__} can use"
    try:
        CudaDevice(0).close()
    except ConfigurationError as error:
        return str(error)
    return None


def describe_gpu() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "gpus": torch.cuda.device_count(),
        "memory_gib": round(device.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)),
        "python": sys.version.split()[0],
    }


def write(
    folder: Path, machine: dict[str, Any], outcomes: list[Outcome], now: datetime.datetime
) -> Path:
    """Keep the outcomes of today; a second run of a day replaces the first."""
    name = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    file = folder / f"gpu-{name}-{now:%Y-%m-%d}.json"
    record = {
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "scripts/gpu_check.py", *sys.argv[1:]]),
        "commit": _commit(),
        "machine": machine,
        "checks": [asdict(o) | {"seconds": round(o.seconds, 1)} for o in outcomes],
    }
    file.write_text(json.dumps(record, indent=1) + "\n")
    return file


def _commit() -> str | None:
    """None where the checkout has come without its history."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())

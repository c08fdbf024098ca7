"""What the programs of this folder have in common: a model, an end, an exit status."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import aiohttp
from rich.console import Console

from benchmark.experiment import RunError
from kunserve_sglang.testing.cluster import ClusterError

ROOT = Path(__file__).resolve().parent.parent
CHUNK_FLAGS = ("--chunked-prefill-size", "256")
SGLANG_FLAGS = (*CHUNK_FLAGS, "--dtype", "bfloat16")
"""What is compared is of one dtype, whichever suits the CPU."""

_PROVIDER = ROOT / "scripts" / "get_model.py"


def flags_of(name: str, description: str) -> argparse.ArgumentParser:
    """A parser that shows defaults, for `python -m benchmark.<name>`."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmark.{name}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def run_program(name: str, work: Callable[[Console], int]) -> NoReturn:
    """Exit with the status of `work`; what went wrong is one line, and Ctrl-C ends all clusters."""
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, _stop)
    try:
        try:
            status = work(console)
        except ExceptionGroup as group:  # of a task group; the others follow from the first
            raise group.exceptions[0] from None
    except (ClusterError, RunError, aiohttp.ClientError, OSError) as error:
        console.print(f"{name}: {error}", style="red", markup=False, soft_wrap=True)
        status = 1
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def small_model() -> Path:
    """The folder of a small real model; raises `RunError` if it cannot be had."""
    if (model := _provided()) is None:
        raise RunError(f"{_PROVIDER.name} could not provide a model; use --model-path")
    return model


def cached_model() -> Path | None:
    """The same if it is there already."""
    return _provided("--cached")


def _provided(*flags: str) -> Path | None:
    command = [sys.executable, str(_PROVIDER), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip()) if done.returncode == 0 else None


def _stop(number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt(f"signal {number}")

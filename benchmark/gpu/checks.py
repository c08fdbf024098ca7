"""Everything that is to be checked on a GPU, in order. A new check is one entry."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

from benchmark.gpu import instances, memory, transport
from benchmark.gpu.check import Bench, Check, Figures, NotPossible

TOTAL_S = 480.0
"""All checks together take no longer."""


def tests(_: Bench) -> Figures:
    """The tests that are marked `gpu` or `multi_gpu`."""
    for needed in ("hypothesis", "pytest", "pytest_timeout"):
        if importlib.util.find_spec(needed) is None:
            raise NotPossible(f"the package {needed} is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout.strip().splitlines()[-1]
    summary = re.findall(r"(\d+) (passed|skipped)", done.stdout)
    return {what: float(count) for count, what in summary}


CHECKS = (
    Check("tests", "tests marked gpu or multi_gpu", 60, tests),
    Check("remap", "time to move pages from layers to KV", 40, memory.remap),
    Check("conservation", "pages under random mapping", 20, memory.conservation),
    Check("leak", "memory after 50 cycles", 20, memory.leak),
    Check("parameters", "a model moves into the pool", 25, memory.parameters),
    Check("sharing", "pages in another process", 30, memory.sharing),
    Check("transport", "packets between processes of one GPU", 30, transport.transport),
    Check("token identity", "greedy tokens with and without a drop", 75, instances.token_identity),
    Check(
        "decode and exchange",
        "decode step: independent, cooperative, with CUDA graphs; bandwidth of KV",
        90,
        instances.decode_and_exchange,
    ),
    Check("burst", "TTFT with and without dropping", 90, instances.burst),
)

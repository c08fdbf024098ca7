"""Everything that is to be checked on a GPU, in order. A new check is one entry."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

from benchmark.gpu import memory, transport
from benchmark.gpu.check import Bench, Check, Figures, NotPossible
from kunserve_sglang.sglang_seam.compatibility import WHY_NOT_ON_CUDA

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


def instances(_: Bench) -> Figures:
    """What needs whole instances on the GPU."""
    raise NotPossible(WHY_NOT_ON_CUDA)


CHECKS = (
    Check("tests", "tests marked gpu or multi_gpu", 100, tests),
    Check("remap", "time to move pages from layers to KV", 60, memory.remap),
    Check("conservation", "pages under random mapping", 30, memory.conservation),
    Check("leak", "memory after 50 cycles", 30, memory.leak),
    Check("parameters", "a model moves into the pool", 40, memory.parameters),
    Check("sharing", "pages in another process", 45, memory.sharing),
    Check("transport", "packets between processes of one GPU", 45, transport.transport),
    Check("token identity", "greedy tokens with and without a drop", 30, instances),
    Check("decode step", "independent, cooperative, with CUDA graphs", 30, instances),
    Check("exchange", "bandwidth of KV between instances", 30, instances),
    Check("burst", "TTFT with and without dropping", 30, instances),
)

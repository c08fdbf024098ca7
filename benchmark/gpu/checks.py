"""Everything that is to be checked on a GPU, in order. A new check is one entry."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

from benchmark.gpu import memory
from benchmark.gpu.check import Bench, Check, Findings, NotPossible
from benchmark.gpu.decode import decode_and_exchange
from benchmark.gpu.side_by_side import side_by_side
from benchmark.gpu.tokens import token_identity
from benchmark.gpu.transport import transport

_CLUSTERS = "tests/gpu/test_ranks.py"

TOTAL_S = 480.0
"""All checks together take no longer."""


def tests(_: Bench, found: Findings) -> None:
    """The tests for GPUs, but for those that start clusters over several, which take minutes."""
    for needed in ("hypothesis", "pytest", "pytest_timeout"):
        if importlib.util.find_spec(needed) is None:
            raise NotPossible(f"the package {needed} is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", f"--ignore={_CLUSTERS}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    summary = re.findall(r"(\d+) (passed|failed|skipped)", done.stdout)
    found.note({what: float(count) for count, what in summary})
    assert done.returncode == 0, done.stdout.strip().splitlines()[-1]


CHECKS = (
    Check("tests", "tests marked gpu or multi_gpu", 40, tests),
    Check("remap", "time to move pages from layers to KV", 35, memory.remap),
    Check("conservation", "pages under random mapping", 15, memory.conservation),
    Check("leak", "memory after 50 cycles", 15, memory.leak),
    Check("parameters", "a model moves into the pool", 15, memory.parameters),
    Check("sharing", "pages in another process", 20, memory.sharing),
    Check("transport", "packets between processes of one GPU", 20, transport),
    Check("token identity", "greedy tokens with and without a drop", 55, token_identity),
    Check(
        "decode and exchange",
        "decode step: independent, cooperative, with CUDA graphs; bandwidth of KV",
        60,
        decode_and_exchange,
    ),
    # Last, since what the others leave over is its.
    Check(
        "side by side",
        "a burst with dropping, without, and on upstream SGLang; throughput without a burst",
        205,
        side_by_side,
    ),
)

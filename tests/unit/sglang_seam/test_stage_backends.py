"""Stages on SGLang's backends for GPUs, with and without graphs, as far as a CPU can run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("backend", ["triton", "flashinfer", "fa3"])
def test_stages_compute_what_they_do_on_a_cpu(
    tiny_model: Path, backend: str, page_size: int
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.interpreted",
            str(tiny_model),
            backend,
            str(page_size),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "SGLANG_USE_CPU_ENGINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]

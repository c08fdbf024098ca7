"""The number format that instances on a CPU compute in, where nobody has named one."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.sglang_seam import cpu_dtype, server

LARGE = 1 << 32


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")


def parsed(model: Path, *flags: str, budget: int = LARGE) -> tuple[str, list[str]]:
    """The dtype that SGLang is told, and what the user is."""
    said: list[str] = []
    server_args = server.parse_server_args(
        ["--model-path", str(model), *flags], budget, said.append
    )
    return server_args.dtype, said


@pytest.mark.parametrize(
    ("slower", "flags", "dtype"),
    [
        (4.0, (), "float32"),
        (0.5, (), "auto"),
        (4.0, ("--dtype", "bfloat16"), "bfloat16"),
    ],
)
def test_what_is_faster_is_taken_unless_one_is_named(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    slower: float,
    flags: tuple[str, ...],
    dtype: str,
) -> None:
    monkeypatch.setattr(cpu_dtype, "times_slower", lambda *_: slower)
    got, said = parsed(tiny_model, *flags)
    assert got == dtype
    assert len(said) == (dtype == "float32")


def test_a_small_budget_keeps_it_and_says_what_would_be_needed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_dtype, "times_slower", lambda *_: 4.0)
    dtype, said = parsed(tiny_model, budget=1 << 16)
    assert dtype == "float16"  # as SGLang serves what is stored in float32
    assert "--memory-budget" in said[0]


def test_the_environment_is_left_as_after_one_look(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for slower in (0.5, 4.0):
        with monkeypatch.context() as patch:
            before = dict(os.environ)
            patch.setattr(cpu_dtype, "times_slower", lambda *_, s=slower: s)
            parsed(tiny_model)
            found.append(dict(os.environ))
            os.environ.clear()
            os.environ.update(before)
    assert found[0] == found[1]


def test_it_is_measured_without_threads_that_a_fork_would_miss() -> None:
    threads = Path("/proc/self/task")
    before = len(list(threads.iterdir()))
    assert cpu_dtype.times_slower(torch.bfloat16, 64, 64) > 0
    assert len(list(threads.iterdir())) <= before


def test_a_measurement_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_dtype, "_seconds", lambda *_: 1 / 0)
    with pytest.raises(ConfigurationError, match="--dtype"):
        cpu_dtype.times_slower(torch.bfloat16, 64, 64)


def test_gpus_have_no_such_choice() -> None:
    server_args = SimpleNamespace(device="cuda", dtype="auto", quantization=None)
    assert cpu_dtype.suited_dtype(server_args, LARGE) is None

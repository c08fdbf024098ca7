"""The checks for a GPU: what they check is tried out on the fake driver, how they are run here."""

from __future__ import annotations

import datetime
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmark.gpu import __main__ as program
from benchmark.gpu import clusters, memory, one, runner, tokens
from benchmark.gpu.check import Bench, Check, Findings, Outcome, Status
from benchmark.gpu.checks import CHECKS, TOTAL_S
from benchmark.gpu.models import EXACT, LARGE, Geometry, configuration
from benchmark.gpu.side_by_side import ON_GPU, SIZES
from benchmark.gpu.transport import transport
from kunserve_sglang.core.layout import LayerRange, MemoryProfile
from kunserve_sglang.memory.cuda import CudaPages
from kunserve_sglang.memory.cuda_driver import CudaDevice
from kunserve_sglang.memory.devices import page_bytes_on_cuda
from tests.support.fake_cuda import FakeCuda
from tests.support.limits import many_open_files
from tests.support.places import ROOT

UNIT = 4096
CPU = torch.device("cpu")
SMOLLM2 = Geometry(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    max_position_embeddings=8192,
)
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Every page of the fake driver is an open file."""
    fake = FakeCuda(granularity=UNIT)
    with many_open_files():
        yield Bench(partial(CudaDevice, 0, fake), CPU, 256 * UNIT)
    for allocation in fake.handles.values():
        os.close(allocation.fd)


def _own_fake() -> CudaDevice:
    """For processes that share nothing but what they send each other."""
    return CudaDevice(0, FakeCuda(granularity=UNIT))


@pytest.mark.parametrize(
    ("check", "figures", "limits"),
    [
        (memory.remap, 24, 1),
        (memory.conservation, 2, 0),
        (memory.leak, 2, 1),
        (memory.parameters, 1, 1),
    ],
)
def test_checks_of_the_memory_pass(
    bench: Bench, check: Callable[[Bench, Findings], None], figures: int, limits: int
) -> None:
    """How long pages take to move here is nothing to be held to a limit of a GPU."""
    found = Findings()
    check(bench, found)
    assert (len(found.figures), len(found.limits)) == (figures, limits)
    assert all(value >= 0 for value in found.figures.values())
    assert all(m["ok"] for m in found.limits if not m["what"].endswith("ms"))


def test_checks_with_another_process_pass() -> None:
    found = Findings()
    memory.sharing(Bench(_own_fake, CPU, 256 * UNIT), found)
    assert found.figures.keys() == {"adopt 1 GiB, ms", "copy, GB/s"}
    transport(Bench(_own_fake, CPU, 256 * UNIT), found)
    assert len(found.figures) == 5
    assert all(value > 0 for value in found.figures.values())


@pytest.mark.parametrize(
    ("check", "call", "complaint"),
    [
        (memory.leak, "close", "bytes gone after 50 cycles"),
        (memory.conservation, "unmap", "a page has another's content"),
    ],
)
def test_checks_find_what_they_look_for(
    bench: Bench,
    check: Callable[[Bench, Findings], None],
    call: str,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pool that forgets a page when it is closed; one that wipes another's when it unmaps."""
    close, unmap = CudaPages.close, CudaPages.unmap

    def forget(pages: CudaPages) -> None:
        pages._handles.pop()
        close(pages)

    def wipe(pages: CudaPages, address: int, count: int) -> None:
        unmap(pages, address, count)
        held = sorted(pages._at)
        if held:
            pages.tensor(held[0], UNIT).zero_()

    monkeypatch.setattr(CudaPages, call, {"close": forget, "unmap": wipe}[call])
    outcome = Check("check", "what", 1, check).outcome(bench, Findings())
    assert outcome["status"] is Status.FAILED
    assert outcome["reason"].startswith(complaint)


def test_all_checks_fit_into_the_time() -> None:
    assert sum(check.limit_s for check in CHECKS) <= TOTAL_S
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def _check(name: str) -> Check:
    (check,) = (c for c in CHECKS if c.name == name)
    return check


@pytest.mark.parametrize(
    ("geometry", "slots", "instances"),
    [
        (EXACT, tokens._SLOTS, 2),
        (SMOLLM2, tokens._SLOTS, 2),
        (LARGE, 10 * LARGE.max_position_embeddings, 2),
        *((LARGE, ON_GPU.slots, size) for size in SIZES),
    ],
)
def test_models_of_the_checks_gain_slots_by_a_drop(
    geometry: Geometry, slots: int, instances: int
) -> None:
    """In a GPU's pages, which are larger than the layers of many a small model."""
    budget = geometry.budget(slots, 2, clusters._PAGE_ON_GPU)
    layers, row = geometry.num_hidden_layers, geometry._row
    embeddings = 4 * geometry.vocab_size * geometry.hidden_size
    layer = (2 * geometry.parameters - embeddings) // layers
    kv = budget - embeddings - layers * layer
    page = page_bytes_on_cuda(budget - embeddings, clusters._PAGE_ON_GPU, kv // (2 * layers))
    profile = MemoryProfile(
        page_bytes=page,
        pages=(budget - embeddings) // page,
        layer_pages=(-(-layer // page),) * layers,
        key_row_bytes=row,
        value_row_bytes=row,
        stride=1 << 24,
        owners=instances,
    )
    alone = profile.capacity(LayerRange(0, layers), 1)
    together = profile.capacity(LayerRange(0, layers // instances), instances)
    assert alone >= slots
    assert together > 1.5 * alone


def test_tokens_are_checked_on_the_real_model_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = configuration(tmp_path / "real", SMOLLM2)
    monkeypatch.setattr(clusters, "cached_model", lambda: model)
    with clusters.exact_rig(Bench(CudaDevice, torch.device("cuda"), 1 << 30)) as rig:
        assert (rig.model, rig.geometry, rig.dtype) == (model, SMOLLM2, "bfloat16")


def test_what_cannot_be_checked_says_why(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ())
    outcome = _check("side by side").outcome(bench, Findings())
    assert outcome["status"] is Status.NOT_POSSIBLE
    assert outcome["reason"].startswith("this package is not installed")


def test_a_check_ends_with_its_time() -> None:
    outcome = runner.run_one(_check("side by side"), 0.01)
    assert (outcome.status, outcome.reason) == (Status.OVER_TIME, "ended after 0 s")
    (late,) = runner.run_all([_check("side by side")], 0, lambda _: None)
    assert late.status is Status.NOT_POSSIBLE


def test_a_check_has_the_time_that_others_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second each for the last two is kept back from the first."""
    given: list[float] = []

    def run(check: Check, limit_s: float) -> Outcome:
        given.append(limit_s)
        return Outcome(check.name, Status.OK)

    monkeypatch.setattr(runner, "run_one", run)
    checks = [Check(name, "", 1, memory.leak) for name in "abc"]
    runner.run_all(checks, 10, lambda _: None)
    assert [round(limit) for limit in given] == [8, 9, 10]
    given.clear()
    runner.run_all(checks, 2, lambda _: None)
    assert [round(limit) for limit in given] == [1, 1, 2]


def test_what_was_found_is_kept_when_a_check_breaks(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_: Bench, found: Findings) -> None:
        found.note({"seconds": 3})
        found.at_most("seconds", 3, 2)
        raise RuntimeError

    monkeypatch.setattr(one, "CHECKS", [Check("breaks", "", 1, breaks)])
    monkeypatch.setattr(Bench, "gpu", lambda: bench)
    with pytest.raises(RuntimeError):
        one.main("breaks", str(tmp_path / "found.json"))
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["figures"] == {"seconds": 3}
    assert [(m["what"], m["ok"]) for m in kept["limits"]] == [("seconds", False)]
    assert "status" not in kept


@WITHOUT_GPU
def test_a_check_that_breaks_is_shown() -> None:
    outcome = runner.run_one(_check("leak"), 100)
    assert outcome.status is Status.FAILED
    assert "exit status 1" in outcome.reason
    assert "no CUDA device 0 here" in outcome.reason


@WITHOUT_GPU
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gpu_check.py")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpu_check: no CUDA device here")
    assert done.stderr.count("\n") == 1


def test_outcomes_are_kept_and_shown(tmp_path: Path) -> None:
    limits = Findings()
    limits.at_most("bytes gone", 9, 8)
    outcomes = [
        Outcome("leak", Status.FAILED, 1.23, {"cycles": 50}, limits.limits, limits.missed),
        Outcome("side by side", Status.NOT_POSSIBLE, reason="no [instances]"),
    ]
    now = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    file = program.write(tmp_path, {"gpu": "NVIDIA H200 (x)"}, outcomes, now)
    assert file.name == "gpu-nvidia-h200-x-2026-01-02.json"
    record = json.loads(file.read_text())
    assert [c["status"] for c in record["checks"]] == ["failed", "not possible"]
    assert record["checks"][0]["figures"] == {"cycles": 50}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(runner.as_table(outcomes, CHECKS))
    shown = console.export_text()
    assert "cycles: 50" in shown
    assert "bytes gone: 9 (<= 8)" in shown
    assert "no [instances]" in shown

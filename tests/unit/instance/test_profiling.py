"""The profile at start: what the shapes look like, how they are timed, and that it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from kunserve_sglang.core.cost_model import Chunk, Work
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.execution.profile import ON_DEVICE, ON_HOST, Timing, shapes
from kunserve_sglang.instance.parts.engine import Hidden, StageBatch
from kunserve_sglang.instance.pipeline import profiling
from kunserve_sglang.instance.ranks.ranks import OneRank
from kunserve_sglang.sglang_seam import assembly


class RecordingEngine:
    """Runs nothing, and remembers what it was asked to run."""

    layer_count = 13

    def __init__(self) -> None:
        self.runs: list[tuple[StageBatch, LayerRange]] = []

    def blank_hidden(self, tokens: int) -> Hidden:
        return torch.zeros(tokens, 1), None

    def clock(self) -> float:
        return time.thread_time()

    def settle(self) -> None:
        return None

    def captured(self, batch: StageBatch) -> Sequence[LayerRange]:  # noqa: ARG002
        return ()

    def forget_owners(self) -> None:
        return None

    def run_stage(
        self, batch: StageBatch, table: torch.Tensor, base: int, layers: LayerRange, hidden: Hidden
    ) -> Hidden:
        assert base == 0
        assert len(hidden[0]) == len(batch.positions) == len(batch.out_slots)
        chunks = {t.dtype for t in (batch.prefix_lens, batch.extend_lens) if t is not None}
        assert chunks <= {torch.int32}  # as real ones are, for which kernels are compiled
        for row, length in zip(batch.rows.tolist(), batch.seq_lens.tolist(), strict=True):
            assert (table[row, :length] > 0).all()  # slot 0 is the dummy
        self.runs.append((batch, layers))
        return hidden


def measure(work: list[Work], timing: Timing = ON_HOST) -> tuple[RecordingEngine, list[Work]]:
    engine = RecordingEngine()
    samples = profiling.measure(engine, work, timing)  # type: ignore[arg-type]
    return engine, [s.work for s in samples]


@pytest.mark.parametrize(("device", "timing"), [("cpu", ON_HOST), ("cuda", ON_DEVICE)])
def test_every_shape_is_run_as_it_is_described(device: str, timing: Timing) -> None:
    work = shapes(device, slots=2000, context=1000, chunk=256, running=32)
    engine, measured = measure(work, timing)
    assert sorted(map(repr, measured)) == sorted(map(repr, work))
    assert {repr(batch.work()) for batch, _ in engine.runs} == {repr(w) for w in work}
    assert all(0 <= r.lo < r.hi <= engine.layer_count for _, r in engine.runs)


def test_a_slow_machine_measures_a_part_of_each_kind() -> None:
    work = shapes("cpu", slots=2000, context=1000, chunk=256, running=32)
    _, measured = measure(work, msgspec.structs.replace(ON_HOST, budget_s=0))
    assert len(measured) < len(work) / 2
    assert sum(bool(w.chunks) for w in measured) >= 4
    assert sum(bool(w.decodes) for w in measured) >= 4


def test_a_profile_is_taken_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    work = [*(Work(decodes=n, context=50 * n) for n in (1, 2, 4)), Work(chunks=(Chunk(0, 9),))]
    first, second, other = (RecordingEngine() for _ in range(3))
    model = profiling.load_or_measure(first, "model A", work)  # type: ignore[arg-type]
    assert profiling.load_or_measure(second, "model A", work) == model  # type: ignore[arg-type]
    profiling.load_or_measure(other, "model B", work)  # type: ignore[arg-type]
    assert first.runs
    assert not second.runs
    assert other.runs


def test_a_broken_cache_is_measured_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    work = [Work(decodes=1, context=50), Work(chunks=(Chunk(0, 9),))]
    profiling.load_or_measure(RecordingEngine(), "key", work)  # type: ignore[arg-type]
    (file,) = (tmp_path / "kunserve" / "profiles").iterdir()
    file.write_text("{")
    again = RecordingEngine()
    profiling.load_or_measure(again, "key", work)  # type: ignore[arg-type]
    assert again.runs


class LateDevice(RecordingEngine):
    """Takes work at once and does it later: time that has not been waited for is not seen.

    A layer of a graph takes 2 ms, any other 5 ms, and in the first two runs of a shape ten times as
    long.
    """

    layer_count = 12
    graphs = (LayerRange(0, 5), LayerRange(5, 12))

    def __init__(self) -> None:
        super().__init__()
        self.now = self.pending = 0.0
        self.waits = 0
        self._runs = 0

    def captured(self, batch: StageBatch) -> Sequence[LayerRange]:
        return self.graphs if batch.decode else ()

    def forget_owners(self) -> None:
        self._runs = 0

    def run_stage(
        self, batch: StageBatch, table: torch.Tensor, base: int, layers: LayerRange, hidden: Hidden
    ) -> Hidden:
        self._runs += 1
        a_layer = 2e-3 if layers in self.graphs else 5e-3
        self.pending += a_layer * len(layers) * (10 if self._runs <= 2 else 1)
        return super().run_stage(batch, table, base, layers, hidden)

    def settle(self) -> None:
        self.waits += 1
        self.now += self.pending
        self.pending = 0.0

    def clock(self) -> float:
        self.settle()
        return self.now


def test_a_device_is_waited_for_and_warmed_up_and_runs_its_graphs() -> None:
    engine = LateDevice()
    work = shapes("cuda", slots=2000, context=1000, chunk=256, running=8)
    samples = profiling.measure(engine, work, ON_DEVICE)  # type: ignore[arg-type]
    assert {round(s.ms, 6) for s in samples if s.work.decodes} == {2.0}
    assert {round(s.ms, 6) for s in samples if s.work.chunks} == {5.0}
    assert {r for batch, r in engine.runs[1:] if batch.decode} == set(engine.graphs)


def scheduler_on(device: torch.device, *, graphs: int = 64) -> Any:
    """As much of a scheduler as its profile is named by."""
    return SimpleNamespace(
        engine=None,
        ranks=OneRank(),
        instance=SimpleNamespace(stage_graph_max_bs=graphs),
        server_args=SimpleNamespace(get_attention_backends=lambda: ("triton", "triton")),
        tp_worker=SimpleNamespace(
            model_runner=SimpleNamespace(torch_device=device, kv_cache_dtype=torch.bfloat16)
        ),
        model_config=SimpleNamespace(
            model_path="m", hf_config="{}", dtype=torch.bfloat16, context_len=4096
        ),
        page_size=1,
        max_total_num_tokens=10_000,
        chunked_prefill_size=None,
        max_prefill_tokens=2048,
        max_running_requests=128,
    )


def test_every_kind_of_device_has_profiles_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And on a GPU every choice of graphs; shapes and timing are those of the device."""
    asked: list[tuple[str, list[Work], Timing]] = []
    monkeypatch.setattr(
        assembly,
        "load_or_measure",
        lambda _, key, work, timing, *__: asked.append((key, work, timing)),
    )
    names = iter(["NVIDIA H200", "NVIDIA L4", "NVIDIA H200"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: next(names))
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for scheduler in (
        scheduler_on(cpu),
        scheduler_on(gpu),
        scheduler_on(gpu),
        scheduler_on(gpu, graphs=0),
        scheduler_on(cpu, graphs=0),
    ):
        assembly.cost_model(scheduler, scheduler.engine)
    keys = [key for key, *_ in asked]
    assert len(set(keys)) == 4
    assert keys[0] == keys[4]
    assert [timing for *_, timing in asked] == [ON_HOST, *[ON_DEVICE] * 3, ON_HOST]
    expected = shapes("cuda", slots=10_000, context=4096, chunk=2048, running=128)
    assert asked[1][1] == expected


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize(
    "work",
    [Work(decodes=3, context=60), Work(chunks=(Chunk(30, 7), Chunk(0, 16), Chunk(0, 1)))],
)
def test_each_request_of_a_probe_begins_a_block(work: Work, block: int) -> None:
    batch, table = profiling.probe(work, block)
    used = set()
    for row, length in zip(batch.rows.tolist(), batch.seq_lens.tolist(), strict=True):
        slots = table[row, :length]
        assert int(slots[0]) % block == 0
        blocks = {slot // block for slot in slots.tolist()}
        assert not used & blocks
        used |= blocks
    assert min(used) == 1
    assert profiling.slots_needed(work, block) == max(used) * block
    assert set(batch.out_slots.tolist()) <= set(table.flatten().tolist())

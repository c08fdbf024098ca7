"""The profile at start: which shapes, what they look like, and that it ends."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kunserve_sglang.instance import profiling
from kunserve_sglang.instance.engine import Hidden, StageBatch
from kunserve_sglang.layout import LayerRange
from kunserve_sglang.policy.cost_model import Chunk, Work


class RecordingEngine:
    """Runs nothing, and remembers what it was asked to run."""

    layer_count = 13

    def __init__(self) -> None:
        self.runs: list[tuple[StageBatch, LayerRange]] = []

    def blank_hidden(self, tokens: int) -> Hidden:
        return torch.zeros(tokens, 1), None

    def clock(self) -> float:
        return time.thread_time()

    def forget_owners(self) -> None:
        return None

    def run_stage(
        self, batch: StageBatch, table: torch.Tensor, base: int, layers: LayerRange, hidden: Hidden
    ) -> Hidden:
        assert base == 0
        assert len(hidden[0]) == len(batch.positions) == len(batch.out_slots)
        for row, length in zip(batch.rows.tolist(), batch.seq_lens.tolist(), strict=True):
            assert (table[row, :length] > 0).all()  # slot 0 is the dummy
        self.runs.append((batch, layers))
        return hidden


def measure(work: list[Work], **arguments: Any) -> tuple[RecordingEngine, list[Work]]:
    engine = RecordingEngine()
    samples = profiling.measure(engine, work, **arguments)  # type: ignore[arg-type]
    return engine, [s.work for s in samples]


def test_shapes_fit_the_memory_and_the_context() -> None:
    for slots, context in ((64, 4096), (500, 300), (100_000, 4096)):
        for work in profiling.shapes(slots, context, 256):
            assert work.context <= slots
            assert sum(c.prefix + c.tokens for c in work.chunks) <= slots
            assert all(c.prefix + c.tokens <= context for c in work.chunks)


def test_every_shape_is_run_as_it_is_described() -> None:
    work = list(profiling.shapes(2000, 1000, 256))
    engine, measured = measure(work)
    assert sorted(map(repr, measured)) == sorted(map(repr, work))
    assert {repr(batch.work()) for batch, _ in engine.runs} == {repr(w) for w in work}
    assert all(0 <= r.lo < r.hi <= engine.layer_count for _, r in engine.runs)


def test_a_slow_machine_measures_a_part_of_each_kind() -> None:
    work = list(profiling.shapes(2000, 1000, 256))
    _, measured = measure(work, budget_s=0)
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

"""Predicted against measured: shapes, the model that knows tokens only, and the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark import cost_model
from benchmark.cost_picture import draw
from benchmark.report import dumps
from kunserve_sglang.core.cost_model import Chunk, CostModel, Sample, Work, fit

TRUE = CostModel(
    prefill=(0.7, 0.05, 0.025, 3.5e-5, 0.005, 1.8e-5),
    decode=(0.8, 0.04, 0.0011),
)
SEEN = [
    *(Work(decodes=n, context=n * length) for n in (1, 4, 16) for length in (16, 128, 512)),
    *(Work(chunks=(Chunk(p, t),)) for t in (16, 64, 256) for p in (0, 128, 512, 1024)),
    *(Work(chunks=(Chunk(0, 32),) * n) for n in (2, 4, 8)),
]


def samples(works: list[Work]) -> list[Sample]:
    return [Sample(work=w, ms=TRUE.predict(w)) for w in works]


def test_other_shapes_are_new_and_fit_the_machine() -> None:
    for slots, context, chunk in ((30_000, 8192, 512), (1500, 1000, 128)):
        everything = cost_model.unseen_shapes([], slots, context, chunk)
        unseen = cost_model.unseen_shapes(everything[:3], slots, context, chunk)
        assert unseen == everything[3:]
        for work in unseen:
            assert work.context <= slots
            assert sum(c.tokens for c in work.chunks) <= chunk
            assert all(c.prefix + c.tokens <= context for c in work.chunks)
        assert {bool(w.chunks) for w in unseen} == {True, False}
    assert any(len(w.chunks) > 1 for w in cost_model.unseen_shapes([], 30_000, 8192, 512))


def test_the_shortest_time_of_a_shape_counts() -> None:
    one, other = SEEN[:2]
    passes = [
        [Sample(work=one, ms=3.0), Sample(work=other, ms=1.0)],
        [Sample(work=one, ms=2.0), Sample(work=other, ms=4.0)],
    ]
    assert cost_model.best_of(passes) == [Sample(work=one, ms=2.0), Sample(work=other, ms=1.0)]


def test_the_model_that_knows_tokens_only_is_exact_without_attention() -> None:
    flat = [
        Sample(work=w, ms=2.0 + 0.5 * (w.decodes + sum(c.tokens for c in w.chunks))) for w in SEEN
    ]
    blind = cost_model.fit_tokens_only(flat)
    assert [blind.predict(s.work) for s in flat] == pytest.approx([s.ms for s in flat])


def test_figures_show_what_attention_is_worth(tmp_path: Path) -> None:
    known = samples(SEEN)
    unseen = samples(cost_model.unseen_shapes(SEEN, 30_000, 8192, 512))
    figures = cost_model.results(fit(known), cost_model.fit_tokens_only(known), unseen)
    (check,) = figures["checks"]
    assert check["ok"]
    assert check["value"] < 0.01
    assert figures["summary"]["tokens_only"]["all"]["median"] > 0.2
    row = figures["rows"][0]
    assert row["error"] == pytest.approx(
        abs(row["predicted_ms"] - row["measured_ms"]) / row["measured_ms"]
    )
    assert json.loads(dumps(figures)) == json.loads(json.dumps(figures))
    draw(figures, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_model_that_is_wrong_fails_the_check() -> None:
    unseen = samples(SEEN)
    blind = cost_model.fit_tokens_only(unseen)
    assert not cost_model.results(blind, blind, unseen)["checks"][0]["ok"]


def test_shapes_read_like_sentences() -> None:
    work = Work(chunks=(Chunk(900, 30), Chunk(0, 40), Chunk(0, 40)))
    assert cost_model.describe(work) == "30 after 900 + 2 x 40"
    assert cost_model.describe(Work(decodes=6, context=1380)) == "6 decodes of 230"

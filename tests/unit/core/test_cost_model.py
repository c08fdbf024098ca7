"""The cost model: what it fits, what it never does, how it follows the machine."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.core.cost_model import (
    Chunk,
    CostEstimate,
    CostModel,
    Sample,
    Work,
    errors,
    fit,
)

TRUE = CostModel(
    prefill=(0.7, 0.05, 0.025, 3.5e-5, 0.005, 1.8e-5),
    decode=(0.8, 0.04, 0.0011),
)


def works(seed: int, count: int) -> list[Work]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        if rng.random() < 0.5:
            decodes = rng.randrange(1, 65)
            found.append(Work(decodes=decodes, context=decodes * rng.randrange(10, 1000)))
        else:
            chunks = [Chunk(rng.randrange(1000), rng.randrange(1, 257)) for _ in range(3)]
            found.append(Work(chunks=tuple(chunks[: rng.randrange(1, 4)])))
    return found


def test_it_finds_the_coefficients_behind_noisy_measurements() -> None:
    rng = random.Random(1)
    samples = [Sample(work=w, ms=TRUE.predict(w) * rng.uniform(0.97, 1.03)) for w in works(2, 60)]
    unseen = [Sample(work=w, ms=TRUE.predict(w)) for w in works(3, 60)]
    assert statistics.median(errors(fit(samples), unseen)) < 0.02


def test_coefficients_are_never_negative() -> None:
    """Negative ones would make some larger batch look cheaper than a smaller one."""
    rng = random.Random(4)
    samples = [Sample(work=w, ms=rng.uniform(1, 2)) for w in works(5, 40)]
    model = fit(samples)
    assert min(*model.prefill, *model.decode) >= 0


def test_both_kinds_must_have_been_measured() -> None:
    with pytest.raises(ValueError, match="prefill and of decode"):
        fit([Sample(work=Work(decodes=1, context=10), ms=1.0)])


@given(st.integers(0, 2000), st.floats(0.1, 50), st.integers(1, 4096))
def test_a_chunk_fills_its_time_and_no_more(prefix: int, target: float, most: int) -> None:
    tokens = TRUE.chunk_tokens(prefix, target, most)
    assert 1 <= tokens <= most
    if tokens > 1:
        assert TRUE.predict(Work(chunks=(Chunk(prefix, tokens),))) <= target
    if tokens < most:
        assert TRUE.predict(Work(chunks=(Chunk(prefix, tokens + 1),))) > target


def test_an_estimate_follows_a_slower_machine_and_forgives_one_bad_run() -> None:
    costs = CostEstimate(TRUE)
    decode = Work(decodes=8, context=800)
    prefill = Work(chunks=(Chunk(0, 100),))
    costs.observe(decode, 100 * TRUE.predict(decode))
    assert costs.predict(decode) < 1.2 * TRUE.predict(decode)
    for _ in range(200):
        costs.observe(decode, 1.5 * TRUE.predict(decode))
    assert costs.predict(decode) == pytest.approx(1.5 * TRUE.predict(decode), rel=0.01)
    assert costs.predict(prefill) == TRUE.predict(prefill)


def test_chunks_are_cut_for_the_machine_as_it_is_now() -> None:
    costs = CostEstimate(TRUE)
    before = costs.chunk_tokens(100, 6.0, 4096)
    for _ in range(200):
        costs.observe(
            Work(chunks=(Chunk(0, 100),)), 2 * TRUE.predict(Work(chunks=(Chunk(0, 100),)))
        )
    now = costs.chunk_tokens(100, 6.0, 4096)
    assert now < before
    assert costs.predict(Work(chunks=(Chunk(100, now),))) <= 6.0 * 1.001
    assert costs.fixed_ms(prefill=True) == pytest.approx(2 * TRUE.prefill_fixed_ms, rel=0.01)


@given(st.integers(0, 1000))
def test_predictions_are_what_the_fit_means_by_its_features(seed: int) -> None:
    for work in works(seed, 3):
        by_chunk = [
            TRUE.prefill[1]
            + TRUE.prefill[2] * c.tokens
            + TRUE.prefill[3] * (c.prefix * c.tokens + c.tokens * (c.tokens + 1) / 2)
            + TRUE.prefill[4] * c.prefix
            + TRUE.prefill[5] * c.prefix**2
            for c in work.chunks
        ]
        expected = sum(by_chunk) + TRUE.prefill[0] * bool(work.chunks)
        if work.decodes:
            step, request, context = TRUE.decode
            expected += step + request * work.decodes + context * work.context
        assert TRUE.predict(work) == pytest.approx(expected)

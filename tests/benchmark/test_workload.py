"""Workloads: the same for the same seed, of the wanted lengths, without shared prefixes."""

from __future__ import annotations

import re
from pydoc_data.topics import topics

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers  # type: ignore[import-untyped]

from benchmark.prompts import PromptSource
from benchmark.workload import Shape, Workload, steady_and_burst


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token a word, so that lengths can be checked by counting."""
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", "\n".join(topics.values()))))
    vocabulary = {word: number for number, word in enumerate(["?", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def build(tokenizer: Tokenizer, seed: int) -> Workload:
    return steady_and_burst(
        PromptSource(tokenizer, seed),
        steady_rate=2.0,
        steady=Shape(prompt_len=20, output_len=5),
        burst_requests=30,
        burst=Shape(prompt_len=40, output_len=9),
        before_s=10.0,
        burst_s=5.0,
        after_s=10.0,
        seed=seed,
    )


def test_the_seed_decides_everything(tokenizer: Tokenizer) -> None:
    assert build(tokenizer, 1) == build(tokenizer, 1)
    one, other = build(tokenizer, 1), build(tokenizer, 2)
    assert {r.arrival_s for r in one.requests}.isdisjoint(r.arrival_s for r in other.requests)
    assert {r.prompt for r in one.requests} != {r.prompt for r in other.requests}


def test_a_burst_is_added_to_a_steady_stream(tokenizer: Tokenizer) -> None:
    workload = build(tokenizer, 3)
    times = [r.arrival_s for r in workload.requests]
    burst = [r for r in workload.requests if r.output_len == 9]
    steady = [r for r in workload.requests if r.output_len == 5]

    assert times == sorted(times)
    assert len(burst) == 30
    assert all(10.0 <= r.arrival_s <= 15.0 for r in burst)
    assert any(r.arrival_s < 10.0 for r in steady)
    assert any(r.arrival_s > 15.0 for r in steady)
    assert (workload.burst_start_s, workload.burst_end_s) == (10.0, 15.0)
    assert workload.output_tokens == 30 * 9 + len(steady) * 5


def test_prompts_have_their_length_and_begin_differently(tokenizer: Tokenizer) -> None:
    workload = build(tokenizer, 4)
    texts = [r.prompt for r in workload.requests if isinstance(r.prompt, str)]

    assert len(texts) == len(workload.requests)
    assert len({text[:20] for text in texts}) == len(texts)
    for request, text in zip(workload.requests, texts, strict=True):
        wanted = 40 if request.output_len == 9 else 20
        assert request.prompt_len == len(tokenizer.encode(text).ids) == wanted


def test_a_source_never_runs_out(tokenizer: Tokenizer) -> None:
    source = PromptSource(tokenizer, 0)
    prompts = [source.tokens(9_000) for _ in range(30)]

    assert all(len(p) == 9_000 for p in prompts)
    assert len({p[:50] for p in prompts}) == len(prompts)
    assert len(source.tokens(500_000)) == 500_000
    with pytest.raises(ValueError, match="no prompt of"):
        source.text(10_000_000)

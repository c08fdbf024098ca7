"""Which micro-batches are measured: they fit, they reach the corners, and they are few."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.core.cost_model import Chunk, Work
from kunserve_sglang.execution.profile import ON_DEVICE, ON_HOST, shapes, timing

_sizes = {
    "slots": st.integers(64, 4_000_000),
    "context": st.integers(64, 200_000),
    "chunk": st.sampled_from([64, 256, 512, 2048, 4096, 8192, 16384]),
    "running": st.integers(1, 4096),
}


def tokens(work: Work) -> int:
    return sum(c.tokens for c in work.chunks)


def slots_of(work: Work) -> int:
    return work.context + sum(c.prefix + c.tokens for c in work.chunks)


@given(device=st.sampled_from(["cpu", "cuda"]), **_sizes)
def test_they_fit_what_there_is(
    device: str, slots: int, context: int, chunk: int, running: int
) -> None:
    for work in shapes(device, slots=slots, context=context, chunk=chunk, running=running):
        assert slots_of(work) <= slots
        assert tokens(work) <= max(chunk, 64)  # on a CPU the smallest three are always measured
        assert all(c.prefix + c.tokens <= context for c in work.chunks)
        if work.decodes:
            assert work.context <= work.decodes * context
            assert work.context % work.decodes == 0
        if device == "cuda":
            assert max(work.decodes, len(work.chunks)) <= max(running, 1)
            assert tokens(work) <= chunk


@given(**_sizes)
def test_on_a_gpu_they_reach_the_corners(
    slots: int, context: int, chunk: int, running: int
) -> None:
    found = shapes("cuda", slots=slots, context=context, chunk=chunk, running=running)
    longest = min(slots, context, 32_768)
    most = min(running, slots, 256)
    decodes = [w for w in found if w.decodes]
    assert max(w.decodes for w in decodes) == most
    assert min(w.decodes for w in decodes) == 1
    assert max(w.context for w in decodes if w.decodes == 1) == longest
    assert max(w.context for w in decodes if w.decodes == most) == most * min(
        slots // most, longest
    )
    single = [w.chunks[0] for w in found if len(w.chunks) == 1]
    largest = max(c.tokens for c in single)
    assert largest == min(chunk, slots, context)
    assert {c.prefix for c in single if c.tokens == largest} >= {0}
    reach = min(slots, context, max(32_768, largest))
    assert max(c.prefix + c.tokens for c in single if c.tokens == largest) == reach
    smallest = [c for c in single if c.tokens == min(c.tokens for c in single)]
    assert max(c.prefix + c.tokens for c in smallest) == reach


@given(**_sizes)
def test_on_a_gpu_they_are_few(slots: int, context: int, chunk: int, running: int) -> None:
    """All prefills together are some ten of the largest; of which a second holds dozens."""
    found = shapes("cuda", slots=slots, context=context, chunk=chunk, running=running)
    assert len(found) == len(set(map(repr, found)))
    assert len(found) <= 75
    assert sum(map(tokens, found)) <= 12 * min(chunk, slots, context) + 12 * 64


def test_on_a_gpu_chunks_and_contexts_are_large() -> None:
    found = shapes("cuda", slots=400_000, context=32_768, chunk=8192, running=64)
    assert len(found) == 48
    single = {w.chunks[0] for w in found if len(w.chunks) == 1}
    assert {c.tokens for c in single} == {32, 128, 512, 2048, 8192}
    assert {c.prefix for c in single if c.tokens == 8192} == {0, 1024, 4096, 24_576}
    assert {w.decodes for w in found if w.decodes} == {1, 4, 16, 64}
    assert max(w.context for w in found) == 400_000 // 64 * 64


def test_on_a_cpu_they_are_what_they_always_were() -> None:
    """Profiles that were kept stay comparable."""
    found = shapes("cpu", slots=30_000, context=8192, chunk=512, running=4096)
    assert found == [
        *(
            Work(decodes=n, context=n * length)
            for n in (1, 2, 4, 8, 16, 32, 64)
            for length in (16, 128, 512, 1024)
            if n * length <= 30_000
        ),
        *(
            Work(chunks=(Chunk(prefix, count),))
            for count in (16, 32, 64, 128, 256, 512)
            for prefix in (0, 128, 512, 1024)
        ),
        *(Work(chunks=(Chunk(0, 32),) * many) for many in (2, 4, 8)),
    ]
    assert len(found) == 52


@pytest.mark.parametrize(("device", "counted"), [("cpu", 2.0), ("cuda", 3.0)])
def test_the_first_runs_do_not_count(device: str, counted: float) -> None:
    """On a CPU the shortest of the others does, on a GPU the one in the middle."""
    how = timing(device)
    assert how is (ON_HOST if device == "cpu" else ON_DEVICE)
    others = [5.0, 2.0, 3.0, 9.0, 2.5][: how.repeats]
    assert how.of([0.1] * how.warmups + others) == counted

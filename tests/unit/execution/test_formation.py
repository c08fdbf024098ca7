"""Lookahead batch formation: equal parts, no more of them than pay, owners that agree."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.core.cost_model import Chunk, CostEstimate, CostModel, Work
from kunserve_sglang.execution.formation import (
    PeerWork,
    chunk_target_ms,
    chunks_ahead,
    look_ahead,
    split_count,
)

COSTS = CostEstimate(
    CostModel(prefill=(0.7, 0.0, 0.025, 3.5e-5, 0.005, 1.8e-5), decode=(0.8, 0.04, 0.0011))
)
LAYERS = 30


def peer(ms: float) -> PeerWork:
    return PeerWork(batch_ms=ms, round_ms=ms)


def round_ms(own: float, count: int, peers: list[PeerWork], fixed: float, stages: int) -> float:
    """How long a round takes at least: no stage idles, and no micro-batch overtakes itself."""
    work = own + (count - 1) * fixed
    total = work + sum(p.round_ms for p in peers)
    return max([total / stages, work / count, *(p.batch_ms for p in peers)])


def test_equal_owners_send_one_micro_batch_each() -> None:
    assert split_count(100, [peer(100)], fixed_ms=20, stages=2, most=4) == 1
    assert split_count(100, [peer(100)] * 3, fixed_ms=20, stages=4, most=8) == 1


def test_an_owner_alone_keeps_every_stage_busy() -> None:
    assert split_count(200, [], fixed_ms=20, stages=2, most=4) == 2
    assert split_count(400, [], fixed_ms=10, stages=4, most=8) == 4


def test_an_owner_with_more_work_sends_more_micro_batches() -> None:
    assert split_count(300, [peer(60)], fixed_ms=20, stages=2, most=4) == 2


def test_a_split_that_costs_more_than_it_brings_is_not_made() -> None:
    assert split_count(100, [peer(90)], fixed_ms=60, stages=2, most=4) == 1
    assert split_count(10, [], fixed_ms=1000, stages=2, most=4) == 1


@given(
    st.floats(1, 1000),
    st.lists(st.floats(1, 1000), max_size=3),
    st.floats(0, 200),
    st.integers(1, 8),
)
def test_the_choice_is_never_worse_than_no_split(
    own: float, others: list[float], fixed: float, most: int
) -> None:
    peers = [peer(ms) for ms in others]
    stages = len(peers) + 1
    count = split_count(own, peers, fixed_ms=fixed, stages=stages, most=most)
    assert 1 <= count <= most
    chosen = round_ms(own, count, peers, fixed, stages)
    assert chosen <= round_ms(own, 1, peers, fixed, stages)
    best = min(round_ms(own, n, peers, fixed, stages) for n in range(1, most + 1))
    assert chosen <= best / 0.97**most


def test_owners_agree_on_how_long_a_chunk_takes() -> None:
    works = [500.0, 100.0, 300.0]
    targets = {
        chunk_target_ms(
            own,
            [PeerWork(batch_ms=50, round_ms=p) for p in works if p != own],
            fixed_ms=5,
            stages=3,
        )
        for own in works
    }
    assert targets == {100}
    assert chunk_target_ms(500, [], fixed_ms=20, stages=2) == 250


def test_a_chunk_is_no_shorter_than_what_comes_between_and_than_pays() -> None:
    short = PeerWork(batch_ms=130, round_ms=20)
    assert chunk_target_ms(100, [short], fixed_ms=20, stages=2) == 130
    assert chunk_target_ms(100, [peer(10)], fixed_ms=20, stages=2) == 80


def test_in_a_backlog_of_prompts_chunks_do_not_get_ever_shorter() -> None:
    """Every owner follows the others, and all of them have two whole chunks ahead."""
    chunk = LAYERS * COSTS.predict(Work(chunks=(Chunk(0, 256),)))
    cut = PeerWork(batch_ms=chunk / 4, round_ms=2 * chunk)
    outlook = look_ahead(
        COSTS, Work(), [Chunk(0, 256), Chunk(0, 256)], [cut], layers=LAYERS, stages=2
    )
    assert outlook.chunk_tokens >= 256


def test_prompts_beside_a_peer_that_decodes_are_cut_in_equal_parts() -> None:
    other = peer(LAYERS * COSTS.predict(Work(decodes=4, context=4 * 200)))
    outlook = look_ahead(COSTS, Work(), [Chunk(0, 256)], [other], layers=LAYERS, stages=2)
    assert outlook.chunk_tokens == 86  # a third
    assert outlook.count > 1  # there is more than the peer's work to send round


def test_a_chunk_after_a_long_prefix_is_worth_its_cost() -> None:
    """The prefix has to be read for each chunk: cut finely, a prompt would take forever."""
    outlook = look_ahead(COSTS, Work(), [Chunk(2000, 256)], [peer(60)], layers=LAYERS, stages=2)
    assert outlook.chunk_tokens == 256


def test_short_prompts_share_a_chunk() -> None:
    outlook = look_ahead(COSTS, Work(), [Chunk(0, 30)] * 4, [peer(400)], layers=LAYERS, stages=2)
    assert outlook.chunk_tokens == 120


def test_without_work_there_is_no_plan_to_split() -> None:
    outlook = look_ahead(COSTS, Work(), [], [], layers=LAYERS, stages=2)
    assert (outlook.count, outlook.round_ms) == (1, 0.0)


def test_what_comes_next_begins_with_the_rest_of_a_prompt() -> None:
    prompts = [Chunk(256, 500), Chunk(0, 30), Chunk(0, 900), Chunk(0, 20)]
    first = [Chunk(256, 256), Chunk(0, 30), Chunk(0, 256)]
    assert chunks_ahead(prompts, limit=256, count=2) == first
    assert chunks_ahead(prompts, limit=256, count=3) == [*first, Chunk(0, 20)]
    assert chunks_ahead([Chunk(256, 0), Chunk(0, 30)], limit=256, count=2) == [Chunk(0, 30)]


@given(
    st.lists(st.builds(Chunk, st.integers(0, 99), st.integers(0, 99))),
    st.integers(1, 50),
    st.integers(1, 8),
)
def test_there_is_enough_for_every_chunk_and_little_more(
    prompts: list[Chunk], limit: int, count: int
) -> None:
    found = chunks_ahead(prompts, limit=limit, count=count)
    tokens = sum(chunk.tokens for chunk in found)
    assert tokens >= min(count * limit, sum(min(p.tokens, limit) for p in prompts))
    assert tokens < (count + 1) * limit


def scaled(model: CostModel, factor: float) -> CostEstimate:
    return CostEstimate(
        CostModel(
            prefill=tuple(factor * c for c in model.prefill),
            decode=tuple(factor * c for c in model.decode),
        )
    )


@given(
    st.integers(-10, 0),
    st.integers(0, 64),
    st.lists(st.builds(Chunk, st.integers(0, 20_000), st.integers(1, 8192)), max_size=3),
    st.lists(st.floats(0.5, 500), max_size=3),
)
def test_a_device_that_is_faster_at_everything_gets_the_same_micro_batches(
    speed: int, decodes: int, prompts: list[Chunk], others: list[float]
) -> None:
    """Nothing is decided by a time or a size that suits one kind of device."""
    factor = 2.0**speed
    work = Work(decodes=decodes, context=300 * decodes)
    slow, fast = (
        look_ahead(
            scaled(COSTS.model, f),
            work,
            prompts,
            [peer(f * ms) for ms in others],
            layers=LAYERS,
            stages=len(others) + 1,
        )
        for f in (1.0, factor)
    )
    assert (slow.count, slow.chunk_tokens) == (fast.count, fast.chunk_tokens)
    assert fast.round_ms == factor * slow.round_ms


ON_A_GPU = CostEstimate(
    CostModel(prefill=(0.1, 0.0, 7e-4, 5e-8, 0.0, 0.0), decode=(0.1, 1e-4, 5e-7))
)
"""Reading the parameters takes as long as computing on 140 tokens."""


def test_where_parameters_are_read_longer_chunks_are_longer() -> None:
    """Beside a peer that decodes; of the same prompt, whose every token a CPU computes slowly."""
    other = peer(LAYERS * ON_A_GPU.predict(Work(decodes=64, context=64 * 500)))
    prompt = Chunk(0, 1000)
    outlook = look_ahead(ON_A_GPU, Work(), [prompt], [other], layers=LAYERS, stages=2)
    least = 4 * ON_A_GPU.predict(Work(chunks=(Chunk(0, 1),)))
    cut = ON_A_GPU.predict(Work(chunks=(Chunk(0, outlook.chunk_tokens),)))
    assert 400 < outlook.chunk_tokens < 1000
    assert cut > 0.8 * least
    slow = peer(LAYERS * COSTS.predict(Work(decodes=1, context=1)))
    on_a_cpu = look_ahead(COSTS, Work(), [prompt], [slow], layers=LAYERS, stages=2)
    assert on_a_cpu.chunk_tokens < outlook.chunk_tokens


def test_where_parameters_are_all_that_counts_a_decode_step_stays_whole() -> None:
    step = Work(decodes=64, context=64 * 300)
    other = peer(LAYERS * ON_A_GPU.predict(step))
    outlook = look_ahead(ON_A_GPU, step, [], [other], layers=LAYERS, stages=2)
    assert outlook.count == 1
    alone = look_ahead(ON_A_GPU, Work(decodes=4, context=400), [], [], layers=LAYERS, stages=2)
    assert alone.count == 1

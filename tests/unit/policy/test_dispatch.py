"""Dispatch policies, which are pure, and the estimate of what a request will need."""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.control.registry import Registry
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.policy.dispatch import POLICIES, Candidate, least_load, lmetric, round_robin
from kunserve_sglang.router.proxy.dispatcher import Dispatcher, Weight, request_tokens
from kunserve_sglang.router.proxy.prefix_index import Prompt
from kunserve_sglang.testing.mock_member import NO_LOAD, hello, status, whole

candidates = st.lists(
    st.builds(
        Candidate,
        in_flight=st.integers(0, 50),
        demand=st.integers(0, 10_000),
        capacity=st.integers(0, 5_000),
        batch=st.integers(0, 9),
        new_tokens=st.integers(1, 9),
        group=st.none() | st.integers(0, 3),
    ),
    min_size=1,
    max_size=9,
)


def candidate(
    demand: int, capacity: int = 1000, in_flight: int = 0, **more: int | None
) -> Candidate:
    known = Candidate(in_flight=in_flight, demand=demand, capacity=capacity)
    return msgspec.structs.replace(known, **more)


@given(candidates, st.integers(0, 1000))
def test_no_candidate_is_less_loaded_than_the_chosen(found: list[Candidate], turn: int) -> None:
    chosen = found[least_load(found, turn)]

    def load(c: Candidate) -> tuple[float, float, int]:
        pool = members(c, found)
        shared = sum(m.demand for m in pool) / max(1, sum(m.capacity for m in pool))
        return shared, c.demand / max(1, c.capacity), c.in_flight

    assert load(chosen) == min(load(c) for c in found)


@given(candidates, st.integers(0, 1000))
def test_no_candidate_has_a_smaller_product_than_the_chosen(
    found: list[Candidate], turn: int
) -> None:
    chosen = found[lmetric(found, turn)]

    def score(c: Candidate) -> float:
        pool = members(c, found)
        return c.new_tokens * (sum(m.batch for m in pool) / len(pool) + 1)

    assert score(chosen) == min(score(c) for c in found)


@given(candidates, st.integers(0, 1000), st.integers(1, 9))
def test_a_group_of_one_is_an_instance_alone(
    found: list[Candidate], turn: int, tokens: int
) -> None:
    alone = [msgspec.structs.replace(c, group=None, new_tokens=tokens) for c in found]
    grouped = [msgspec.structs.replace(c, group=i) for i, c in enumerate(alone)]
    for policy in POLICIES.values():
        assert policy(alone, turn) == policy(grouped, turn)


def members(of: Candidate, found: list[Candidate]) -> list[Candidate]:
    return [of] if of.group is None else [c for c in found if c.group == of.group]


def test_load_is_a_share_of_the_capacity() -> None:
    assert least_load([candidate(600, 1000), candidate(900, 2000)], 0) == 1


def test_ties_go_to_fewer_requests_and_then_in_turn() -> None:
    assert least_load([candidate(5, in_flight=2), candidate(5, in_flight=1)], 0) == 1
    equal = [candidate(5)] * 3
    assert [least_load(equal, turn) for turn in range(6)] == [0, 1, 2, 0, 1, 2]


def test_a_group_is_one_pool() -> None:
    full, empty = candidate(900, group=0), candidate(0, group=0)
    assert least_load([full, empty, candidate(400)], 0) == 2
    assert least_load([full, empty, candidate(500)], 0) == 1


def test_lmetric_weighs_a_prefix_against_a_batch() -> None:
    def score(new_tokens: int, batch: int, group: int | None = None) -> Candidate:
        return candidate(0, new_tokens=new_tokens, batch=batch, group=group)

    assert lmetric([score(100, 3), score(399, 0)], 0) == 1
    assert lmetric([score(100, 3), score(401, 0)], 0) == 0
    assert lmetric([score(50, 1), score(100, 0)], 0) == 0, "equal, and less to compute"
    assert lmetric([score(100, 5, 7), score(100, 2), score(100, 1, 7)], 0) == 1, "mean batch 3"
    assert lmetric([score(100, 5, 7), score(100, 4), score(90, 1, 7)], 0) == 2, "own prefix"


def test_lmetric_counts_prompts_that_are_ahead() -> None:
    busy = candidate(0, new_tokens=100, batch=3, ahead=300)
    assert lmetric([busy, candidate(0, new_tokens=399, batch=3)], 0) == 1
    assert lmetric([busy, candidate(0, new_tokens=401, batch=3)], 0) == 0


def test_prompts_ahead_are_those_reported_and_those_on_their_way() -> None:
    registry = Registry(2)
    for number in range(2):
        registry.hello(hello(number, f"http://127.0.0.1:{number + 1}"))
        registry.instances[number].liveness.serves()
    seen: list[list[int]] = []

    def look(candidates: Sequence[Candidate], turn: int) -> int:  # noqa: ARG001
        seen.append([c.ahead for c in candidates])
        return 0

    for dispatcher in (Dispatcher(registry), Dispatcher(registry, ahead=True)):
        weight = Weight(9, Prompt(7))
        chosen = dispatcher.pick(look, weight, lambda _: True)
        assert chosen is registry.instances[0]
        with dispatcher.under_way(chosen, weight), dispatcher.under_way(chosen, weight):
            dispatcher.pick(look, weight, lambda _: True)
            waiting = msgspec.structs.replace(NO_LOAD, waiting=1, prompts=50)
            layout = Layout(epoch=0, members=(whole(0),))
            chosen.status = status(0, layout, waiting, {})
            dispatcher.pick(look, weight, lambda _: True)
            chosen.status = None
        dispatcher.pick(look, weight, lambda _: True)
    assert seen == [[0, 0]] * 5 + [[14, 0], [57, 0], [0, 0]]


def test_round_robin_takes_turns() -> None:
    found = [candidate(900), candidate(0)]
    assert [round_robin(found, turn) for turn in range(4)] == [0, 1, 0, 1]


def tokens(**fields: object) -> int:
    return request_tokens(json.dumps(fields).encode())


def test_a_request_needs_its_prompt_and_a_share_of_its_limit() -> None:
    short, long = tokens(prompt="x" * 400), tokens(prompt="x" * 4400)
    assert long - short == 1000
    assert tokens(max_tokens=1000) - tokens(max_tokens=0o1) > 650
    for limits in (
        {"max_tokens": 1000},
        {"max_completion_tokens": 1000},
        {"max_output_tokens": 1000},
        {"sampling_params": {"max_new_tokens": 1000}},
        {"sampling_params": [{"max_new_tokens": 400}, {"max_new_tokens": 600}]},
    ):
        assert 700 <= tokens(**limits) < 730


def test_a_prompt_that_was_not_read_is_estimated_by_its_bytes() -> None:
    assert Weight(9, Prompt(7)).prompt_tokens(b"x" * 400) == 7
    assert Weight(9, Prompt(0)).prompt_tokens(b"x" * 400) == 100


def test_no_body_needs_nothing_and_nonsense_does_not_hurt() -> None:
    assert request_tokens(b"") == 0
    for body in (b"{", b"\xff\xfe", b"[1]", b'{"max_tokens": "many"}', b'{"x":' + b"[" * 100_000):
        assert request_tokens(body) > 0

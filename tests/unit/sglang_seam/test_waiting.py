"""Who of the queue SGLang gets to see while the router bounds how many requests run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kunserve_sglang.core.first_token import FirstTokenLimit
from kunserve_sglang.core.messages import Attainable
from kunserve_sglang.sglang_seam.waiting import WaitingRequests

SLOTS = 1000
FREE = SimpleNamespace(batch_is_full=False, reqs=[])


class Request:
    """Of ten tokens, and as many to come."""

    def __init__(self, name: str, length: int = 10) -> None:
        self.rid = name
        self.seqlen = length
        self.origin_input_ids = [0] * length
        self.output_ids: list[int] = []
        self.sampling_params = SimpleNamespace(max_new_tokens=10, ignore_eos=True)
        self.finished_reason: object = None

    def finished(self) -> bool:
        return self.finished_reason is not None


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def queue_of(waiting: list[Request], running: int) -> tuple[WaitingRequests, Any]:
    scheduler = SimpleNamespace(
        waiting_queue=waiting,
        page_size=1,
        max_total_num_tokens=SLOTS,
        max_req_input_len=0,
        tp_worker=SimpleNamespace(max_slots=10 * SLOTS, longest_input=lambda slots: slots),
        tree_cache=SimpleNamespace(disable=True),
        token_to_kv_pool_allocator=SimpleNamespace(size=SLOTS),
        chunked_req=None,
        requests_with_slots=lambda: [Request(f"running {i}") for i in range(running)],
        init_req_max_new_tokens=lambda _: None,
        clock=Clock(),
    )
    containment = SimpleNamespace(
        look_again=lambda *_: None, may_run=lambda _: True, answer=lambda *_: None
    )
    return WaitingRequests(scheduler, containment), scheduler  # type: ignore[arg-type]


@pytest.mark.parametrize(("most", "seen"), [(0, 6), (3, 0), (4, 0), (6, 2), (20, 6)])
def test_no_more_are_seen_than_may_run_beside_those_that_do(most: int, seen: int) -> None:
    requests = [Request(str(i)) for i in range(6)]
    waiting, scheduler = queue_of(list(requests), running=4)
    waiting.limit(Attainable(slots=SLOTS, running=most))
    with waiting.admissible(SimpleNamespace(batch_is_full=False, reqs=[])):
        assert scheduler.waiting_queue == requests[:seen]
        del scheduler.waiting_queue[:1]  # SGLang admits the first
    assert scheduler.waiting_queue == (requests[1:] if seen else requests)


def test_one_that_is_too_large_takes_no_seat_and_keeps_its_place() -> None:
    requests = [Request("first"), Request("large", 2 * SLOTS), Request("second"), Request("third")]
    waiting, scheduler = queue_of(list(requests), running=0)
    waiting.limit(Attainable(slots=10 * SLOTS, running=2))
    with waiting.admissible(SimpleNamespace(batch_is_full=False, reqs=[])):
        assert [r.rid for r in scheduler.waiting_queue] == ["first", "second"]
    assert scheduler.waiting_queue == requests


def test_one_that_there_will_be_no_room_for_leaves_the_queue() -> None:
    large = Request("large", 2 * SLOTS)
    waiting, scheduler = queue_of([large], running=0)
    with waiting.admissible(FREE):
        assert scheduler.waiting_queue == []
    assert scheduler.waiting_queue == [large]
    scheduler.clock.now += 11
    with waiting.admissible(FREE):
        pass
    assert large.finished()
    assert scheduler.waiting_queue == []


# -- whose turn it is ----------------------------------------------------------------------------

A_SECOND = Attainable(slots=SLOTS, first_token=FirstTokenLimit(ms=1000.0))


def seen(waiting: WaitingRequests, scheduler: Any) -> list[str]:
    with waiting.admissible(FREE):
        return [r.rid for r in scheduler.waiting_queue]


def test_those_that_are_late_let_the_others_go_first() -> None:
    early, late = Request("early"), Request("late")
    waiting, scheduler = queue_of([early], running=0)
    waiting.limit(A_SECOND)
    assert seen(waiting, scheduler) == ["early"]
    scheduler.clock.now += 0.9
    scheduler.waiting_queue.append(late)
    assert seen(waiting, scheduler) == ["late"]
    assert scheduler.waiting_queue == [early, late]
    scheduler.waiting_queue.remove(late)  # it has been admitted
    assert seen(waiting, scheduler) == ["early"]


def test_nobody_is_put_off_for_ever() -> None:
    waiting, scheduler = queue_of([Request("first")], running=0)
    waiting.limit(A_SECOND)
    seen(waiting, scheduler)
    admitted: list[str] = []
    for turn in range(40):
        scheduler.clock.now += 0.1
        scheduler.waiting_queue.append(Request(str(turn)))
        admitted += seen(waiting, scheduler)[:1]
        scheduler.waiting_queue = [r for r in scheduler.waiting_queue if r.rid not in admitted]
    assert "first" in admitted[:35]


def test_without_a_limit_nobody_is_late() -> None:
    waiting, scheduler = queue_of([Request("first")], running=0)
    seen(waiting, scheduler)
    scheduler.clock.now += 1000
    scheduler.waiting_queue.append(Request("second"))
    assert seen(waiting, scheduler) == ["first", "second"]


def test_whoever_has_had_a_first_token_is_not_late() -> None:
    retracted = Request("retracted")
    retracted.output_ids = [1]
    waiting, scheduler = queue_of([retracted], running=0)
    waiting.limit(A_SECOND)
    seen(waiting, scheduler)
    scheduler.clock.now += 0.9
    scheduler.waiting_queue.append(Request("second"))
    assert seen(waiting, scheduler) == ["retracted", "second"]


def test_a_long_prompt_may_take_longer() -> None:
    waiting, scheduler = queue_of([Request("long", 100), Request("short", 10)], running=0)
    told = Attainable(slots=SLOTS, first_token=FirstTokenLimit(ms=1000.0, tokens=50))
    waiting.limit(told)
    seen(waiting, scheduler)
    scheduler.clock.now += 0.9
    assert seen(waiting, scheduler) == ["long"]


def test_those_put_off_keep_their_places_among_others() -> None:
    names = ["a", "large", "b", "new"]
    requests = {name: Request(name, 2 * SLOTS if name == "large" else 10) for name in names}
    waiting, scheduler = queue_of([requests[n] for n in names[:3]], running=0)
    waiting.limit(Attainable(slots=10 * SLOTS, first_token=FirstTokenLimit(ms=1000.0)))
    seen(waiting, scheduler)
    scheduler.clock.now += 0.9
    scheduler.waiting_queue.append(requests["new"])
    with waiting.admissible(FREE):
        assert [r.rid for r in scheduler.waiting_queue] == ["new"]
        scheduler.waiting_queue = [Request("more"), requests["new"]]  # SGLang sorts, and adds
    assert [r.rid for r in scheduler.waiting_queue] == ["more", "a", "large", "b", "new"]

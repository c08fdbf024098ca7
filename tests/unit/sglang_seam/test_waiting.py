"""Who of the queue SGLang gets to see while the router bounds how many requests run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kunserve_sglang.sglang_seam.waiting import WaitingRequests

SLOTS = 1000


class Request:
    """Of ten tokens, and as many to come."""

    def __init__(self, name: str, length: int = 10) -> None:
        self.rid = name
        self.seqlen = length
        self.output_ids: list[int] = []
        self.sampling_params = SimpleNamespace(max_new_tokens=10, ignore_eos=True)

    def finished(self) -> bool:
        return False


def queue_of(waiting: list[Request], running: int) -> tuple[WaitingRequests, Any]:
    scheduler = SimpleNamespace(
        waiting_queue=waiting,
        max_total_num_tokens=SLOTS,
        max_req_input_len=0,
        tp_worker=SimpleNamespace(max_slots=10 * SLOTS, longest_input=lambda slots: slots),
        tree_cache=SimpleNamespace(disable=True),
        token_to_kv_pool_allocator=SimpleNamespace(size=SLOTS),
        chunked_req=None,
        requests_with_slots=lambda: [Request(f"running {i}") for i in range(running)],
        init_req_max_new_tokens=lambda _: None,
        clock=lambda: 0.0,
    )
    containment = SimpleNamespace(look_again=lambda *_: None, may_run=lambda _: True)
    return WaitingRequests(scheduler, containment), scheduler  # type: ignore[arg-type]


@pytest.mark.parametrize(("most", "seen"), [(0, 6), (3, 0), (4, 0), (6, 2), (20, 6)])
def test_no_more_are_seen_than_may_run_beside_those_that_do(most: int, seen: int) -> None:
    requests = [Request(str(i)) for i in range(6)]
    waiting, scheduler = queue_of(list(requests), running=4)
    waiting.limit(SLOTS, most)
    with waiting.admissible(SimpleNamespace(batch_is_full=False, reqs=[])):
        assert scheduler.waiting_queue == requests[:seen]
        del scheduler.waiting_queue[:1]  # SGLang admits the first
    assert scheduler.waiting_queue == (requests[1:] if seen else requests)


def test_one_that_is_too_large_takes_no_seat_and_keeps_its_place() -> None:
    requests = [Request("first"), Request("large", 2 * SLOTS), Request("second"), Request("third")]
    waiting, scheduler = queue_of(list(requests), running=0)
    waiting.limit(10 * SLOTS, 2)
    with waiting.admissible(SimpleNamespace(batch_is_full=False, reqs=[])):
        assert [r.rid for r in scheduler.waiting_queue] == ["first", "second"]
    assert scheduler.waiting_queue == requests

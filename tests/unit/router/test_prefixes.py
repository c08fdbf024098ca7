"""A router with `--dispatch lmetric` and mock instances: who gets which prompt."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from kunserve_sglang.core.blocks import BLOCK_TOKENS, block_hashes
from kunserve_sglang.core.choices import DispatchPolicy
from tests.support.background import Background
from tests.support.mock_worker import Canned, MockWorker
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

SHARED = tuple(range(3 * BLOCK_TOKENS))


def ask(router: RouterCluster, *more: int) -> None:
    assert router.post("/generate", {"input_ids": [*SHARED, *more]}).status == 200


def blocks() -> list[int]:
    return block_hashes(array("q", SHARED))


@pytest.fixture
def lmetric(start_router: Callable[..., RouterCluster]) -> RouterCluster:
    router = start_router(2, dispatch=DispatchPolicy.LMETRIC)
    for instance in router.instances:
        instance.worker.answers["/generate"] = Canned({"text": ""})
    return router


def chosen(router: RouterCluster) -> list[int]:
    return [len(i.worker.requests("/generate")) for i in router.instances]


def known_tokens(router: RouterCluster, number: int) -> float:
    name = f'kunserve:prefix_index_tokens{{instance="{number}"}} '
    lines = router.get("/metrics").body.decode().splitlines()
    return next((float(x.removeprefix(name)) for x in lines if x.startswith(name)), -1)


def in_step(router: RouterCluster) -> None:
    until(lambda: all(known_tokens(router, i.number) >= 0 for i in router.instances))


def test_requests_go_where_their_prefix_is(lmetric: RouterCluster) -> None:
    lmetric.instances[1].cache(blocks())
    until(lambda: known_tokens(lmetric, 1) == len(SHARED))
    for i in range(4):
        ask(lmetric, i)
    assert chosen(lmetric) == [0, 4]
    metrics = lmetric.get("/metrics").body
    assert b"kunserve:prompt_tokens_total 388.0" in metrics
    assert b"kunserve:predicted_hit_tokens_total 384.0" in metrics


def test_a_prefix_on_its_way_counts_until_it_is_flushed(lmetric: RouterCluster) -> None:
    in_step(lmetric)
    for i in range(3):
        ask(lmetric, i)
    assert sorted(chosen(lmetric)) == [0, 3]
    for instance in lmetric.instances:
        instance.worker.answers["/flush_cache"] = Canned("ok")
    assert lmetric.post("/flush_cache").status == 200
    for _ in range(2):
        ask(lmetric)
        lmetric.post("/flush_cache")
    assert min(chosen(lmetric)) >= 1


def test_an_evicted_prefix_draws_nobody(lmetric: RouterCluster) -> None:
    lmetric.instances[1].cache(blocks())
    until(lambda: known_tokens(lmetric, 1) == len(SHARED))
    lmetric.instances[1].cache(())
    until(lambda: known_tokens(lmetric, 1) == 0)
    lmetric.instances[0].cache(blocks()[:1])
    until(lambda: known_tokens(lmetric, 0) == BLOCK_TOKENS)
    ask(lmetric)
    assert chosen(lmetric) == [1, 0]


def test_a_large_batch_outweighs_a_prefix(lmetric: RouterCluster) -> None:
    lmetric.instances[1].cache(blocks()[:2])
    lmetric.instances[1].set_load(1000, running=3)
    until(lambda: known_tokens(lmetric, 1) == 2 * BLOCK_TOKENS)
    until(lambda: lmetric.described(1)["running"] == 3)
    ask(lmetric)
    assert chosen(lmetric) == [1, 0], "96 tokens beside nobody against 32 beside three"


def test_a_restarted_router_asks_anew(lmetric: RouterCluster) -> None:
    lmetric.instances[1].cache(blocks())
    until(lambda: known_tokens(lmetric, 1) == len(SHARED))
    lmetric.stop_router()
    lmetric.start_router()
    until(lambda: known_tokens(lmetric, 1) == len(SHARED), timeout_s=20)
    lmetric.ready(2)
    ask(lmetric)
    assert chosen(lmetric) == [0, 1]


def test_plain_servers_are_known_by_what_was_sent_there(
    start_router: Callable[..., RouterCluster],
) -> None:
    router = start_router(0, dispatch=DispatchPolicy.LMETRIC)
    background = Background()
    workers = [MockWorker(background) for _ in range(2)]
    try:
        for worker in workers:
            worker.answers["/server_info"] = Canned({"max_total_num_tokens": 1000})
            worker.answers["/generate"] = Canned({"text": ""})
            worker.answers["/flush_cache"] = Canned("ok")
            assert router.post("/workers", {"url": worker.url}).status == 201
        until(lambda: all(i["serving"] for i in router.status()["instances"]))
        ask(router)
        first = next(w for w in workers if w.requests("/generate"))
        for i in range(3):
            ask(router, i)
        assert len(first.requests("/generate")) == 4
    finally:
        router.stop_router()
        for worker in workers:
            worker.stop()
        background.stop()
        router.start_router()


def test_other_policies_ask_for_no_reports(start_router: Callable[..., RouterCluster]) -> None:
    router = start_router(2, dispatch=DispatchPolicy.LEAST_LOAD)
    router.instances[0].cache(blocks())
    until(lambda: router.instances[0].cached)
    assert not any(i.obeyed["Welcome"] for i in router.instances)
    assert known_tokens(router, 0) == -1

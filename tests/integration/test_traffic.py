"""Transitions in the middle of traffic, through HTTP, with the real model in fp32."""

from __future__ import annotations

import http.client
import json
import pydoc_data.topics
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from urllib.parse import urlsplit

from tests.integration.conftest import Client
from tests.support.waiting import until

PROMPTS = [
    " ".join(text.split()[:150])
    for text in islice((t for t in pydoc_data.topics.topics.values() if len(t) > 2000), 10)
]


def test_answers_are_the_same_through_two_cycles(independent: Client) -> None:
    """Ten streams of requests; two drops and two restores strike wherever they happen to be."""
    independent.call("POST", "/flush_cache")

    def ask(prompt: str) -> tuple[int, ...]:
        return tuple(independent.generate(prompt, 24, ignore_eos=True)["output_ids"])

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        expected = list(pool.map(ask, PROMPTS))
        independent.call("POST", "/flush_cache")
        events, answers = [], []
        for change in (
            independent.drop,
            independent.restore,
            independent.drop,
            independent.restore,
        ):
            round_ = [pool.submit(ask, prompt) for prompt in PROMPTS]
            events.append(change())
            answers.append([future.result() for future in round_])
    assert answers == [expected] * 4
    assert sum(e["exchanged_bytes"] for e in events) > 0
    assert events[-1]["capacity_after"] == events[0]["capacity_before"]
    pages = [i["pages"] for i in independent.status()["instances"]]
    assert all(p["parameters"] + p["kv"] + p["free"] == p["total"] for p in pages)


def running(cluster: Client) -> int:
    return sum(i["running"] for i in cluster.status()["instances"])


def test_a_client_that_leaves_frees_its_slots(cluster: Client) -> None:
    """In cooperative mode too: the stream is cut, the request aborted on its owner.

    With a key, it would go on if its router had ended.
    """
    keyed = {"Idempotency-Key": "one-that-leaves"}
    for change, headers in ((cluster.drop, keyed), (cluster.restore, keyed), (cluster.drop, {})):
        change()
        cluster.wait_until_idle()
        address = urlsplit(cluster.url)
        body = {
            "text": PROMPTS[0],
            "stream": True,
            "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
        }
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        with closing(connection):
            connection.request(
                "POST",
                "/generate",
                json.dumps(body),
                {"Content-Type": "application/json", **headers},
            )
            with closing(connection.getresponse()) as answer:
                assert answer.readline().startswith(b"data:")
                # For a moment it may not be alone: the router asks whether instances are well.
                until(lambda: running(cluster) <= 1, about=cluster.status)
        cluster.wait_until_idle()
    cluster.restore()


def test_more_than_one_pool_holds_fits_after_a_drop(cluster: Client) -> None:
    """Requests that together need more slots than before all run at once after the drop."""
    cluster.wait_until_idle()
    before = sum(i["slots"]["capacity"] for i in cluster.status()["instances"])
    event = cluster.drop()
    try:
        assert event["freed_bytes"] >= 400_000_000
        assert event["capacity_after"] > 1.5 * before
        assert event["capacity_after"] == sum(
            i["slots"]["capacity"] for i in cluster.status()["instances"]
        )
    finally:
        cluster.restore()

"""Requests of a conversation, real instances, and where they go."""

from __future__ import annotations

import pydoc_data.topics
from typing import Any

from tests.integration.conftest import Client
from tests.support.waiting import until

TEXT = max(pydoc_data.topics.topics.values(), key=len).split()


def words(number: int) -> str:
    return " ".join(TEXT[200 * number : 200 * (number + 1)])


def say(client: Client, messages: list[dict[str, str]]) -> tuple[int, dict[str, Any]]:
    """Appends the answer to the chat; returns the tokens of the prompt that were cached."""
    body = {"model": "default", "messages": messages, "max_tokens": 8, "temperature": 0}
    status, answer = client.call("POST", "/v1/chat/completions", body)
    assert status == 200, answer
    messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    _, metrics = client.call("GET", "/metrics")
    return predicted(metrics), answer["usage"]


def predicted(metrics: str) -> int:
    """Tokens that the router has expected to find cached, since its start."""
    name = "kunserve:predicted_hit_tokens_total "
    line = next(x for x in metrics.splitlines() if x.startswith(name))
    return int(float(line.removeprefix(name)))


def cached(client: Client) -> dict[int, int]:
    return {i["id"]: i["slots"]["cached"] for i in client.status()["instances"]}


def wait_for_cached(client: Client, empty: bool) -> dict[int, int]:
    until(
        lambda: any(cached(client).values()) is not empty,
        20,
        poll_s=0.05,
        about=lambda: cached(client),
    )
    return cached(client)


def test_a_conversation_stays_where_its_prefix_is(independent: Client) -> None:
    """Two conversations; each turn finds the one before, and no prefix is computed twice."""
    independent.wait_until_idle()
    assert independent.call("POST", "/flush_cache?timeout=10")[0] == 200
    wait_for_cached(independent, empty=True)
    talks = [[{"role": "user", "content": words(n)}] for n in (0, 1)]
    for talk in talks:
        say(independent, talk)
    first = wait_for_cached(independent, empty=False)
    for turn in (2, 3):
        for number, talk in enumerate(talks):
            talk.append({"role": "user", "content": f"{number} {words(turn)[:200]}"})
            before = predicted(independent.call("GET", "/metrics")[1])
            after, usage = say(independent, talk)
            assert 100 < after - before < usage["prompt_tokens"]
    independent.wait_until_idle()
    grown = cached(independent)
    assert sum(grown.values()) < 1.6 * sum(first.values()), "as if sent to one instance each"


def test_after_a_flush_it_goes_anywhere(independent: Client) -> None:
    talk = [{"role": "user", "content": words(4)}]
    say(independent, talk)
    independent.wait_until_idle()
    assert independent.call("POST", "/flush_cache?timeout=10")[0] == 200
    wait_for_cached(independent, empty=True)
    before = predicted(independent.call("GET", "/metrics")[1])
    after, _ = say(independent, [{"role": "user", "content": words(4)}])
    assert after == before

"""The benchmark of dispatch policies: its conversations, its figures and its checks."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmark.checks import Check
from benchmark.conversations import Conversation, Mix, Turn, conversations, hold
from benchmark.dispatch import checks, row, summarise
from benchmark.prompts import PromptSource
from kunserve_sglang.core.choices import DispatchPolicy
from tests.support.serving import serving

MIX = Mix(
    conversations=6,
    starts_within_s=10.0,
    system_prompts=3,
    system_len=30,
    turns=2,
    question_len=5,
    answer_len=4,
    mean_pause_s=1.0,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return found


def test_system_prompts_are_shared_alike_and_questions_are_not(tokenizer: Tokenizer) -> None:
    planned = conversations(MIX, PromptSource(tokenizer, 1), seed=1)
    assert list(Counter(c.system for c in planned).values()) == [2, 2, 2]
    questions = [q for c in planned for q in c.questions]
    assert len(questions) == 12
    assert all(a != b for a, b in pairwise(questions))
    assert all(0 <= c.start_s <= 10 for c in planned)
    assert planned == conversations(MIX, PromptSource(tokenizer, 1), seed=1)


class Server:
    """Answers with the number of the request, and fails the third."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self.prompts.append((await request.json())["text"])
        number = len(self.prompts)
        if number == 3:
            return web.Response(status=503)
        response = web.StreamResponse()
        await response.prepare(request)
        for text in (" a", f" a{number}"):
            about = {"prompt_tokens": 10 * number, "cached_tokens": number}
            event = json.dumps({"text": text, "meta_info": about})
            await response.write(f"data: {event}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


def test_a_turn_repeats_all_that_was_said_and_a_failure_ends_it() -> None:
    server = Server()
    talk = Conversation(0.0, "S", ("one", "two", "three", "four"), (0.0,) * 4)

    async def run() -> list[Turn]:
        async with serving(server.generate) as url:
            return await hold(url, [talk], answer_len=4)

    turns = asyncio.run(run())
    first = "S\n\nQuestion: one\nAnswer:"
    assert server.prompts[:2] == [first, f"{first} a1\n\nQuestion: two\nAnswer:"]
    assert len(server.prompts) == 3
    assert [t.error for t in turns] == ["", "", "HTTP 503"]
    assert [(t.prompt_tokens, t.cached_tokens) for t in turns] == [(10, 1), (20, 2), (0, 0)]
    assert all(t.ttft_s > 0 for t in turns[:2])


def rows(**ours: Any) -> list[dict[str, Any]]:
    found = []
    for policy in DispatchPolicy:
        turns = [Turn(0, ttft_s=t / 10, prompt_tokens=100, cached_tokens=50) for t in range(1, 11)]
        figures = row(policy, [summarise(turns, 9.0, 0.5, 0.0)] * 3)
        found.append({**figures, **(ours if policy is DispatchPolicy.LMETRIC else {})})
    return found


def failed(found: list[Check]) -> list[str]:
    return [check.what for check in found if not check.ok]


def test_figures() -> None:
    turns = [Turn(0, ttft_s=0.1, prompt_tokens=30, cached_tokens=12), Turn(1, error="lost")]
    found = summarise(turns, 9.0, 0.25, 0.1)
    assert (found.hit_rate, found.turns, found.failed) == (0.4, 1, 1)
    assert found.ttft_p50_ms == found.ttft_p99_ms == pytest.approx(100)
    assert math.isnan(summarise(turns[1:], 9.0, 0.25, 0.1).ttft_p50_ms)


def test_equal_figures_pass_and_worse_ones_do_not() -> None:
    assert not failed(checks(rows()))
    assert len(failed(checks(rows(hit_rate=0.4)))) == 2
    assert len(failed(checks(rows(ttft_p99_ms=2000.0)))) == 2
    assert len(failed(checks(rows(predicted=0.8)))) == 1
    assert len(failed(checks(rows(failed=1)))) == 1
    assert len(failed(checks(rows(ttft_p50_ms=math.nan)))) == 2

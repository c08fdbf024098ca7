"""A stream that another instance goes on with is the stream that its client would have got.

All that a stream may ask for is drawn at random, and where it is left. More seeds are tried with
`KUNSERVE_RESUMED=200 pytest tests/unit/members/test_resumed_streams.py`.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kunserve_sglang.testing import tiny_model
from tests.support.calls import calling_scripts
from tests.support.cluster import ScriptedCluster
from tests.support.identity import alike, small_cluster
from tests.support.left_streams import (
    Event,
    all_streams,
    events_by_choice,
    events_of,
    left_after,
    told,
)
from tests.support.schedules import Script
from tests.support.script import Call, Journaled

SEEDS = range(int(os.environ.get("KUNSERVE_RESUMED", "2")))


@pytest.fixture(scope="module")
def parsing(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScriptedCluster]:
    """A member that looks for calls of tools in what it says."""
    with small_cluster(
        tmp_path_factory.mktemp("parsing"),
        1,
        tiny_model,
        skip_tokenizer_init=False,
        tool_call_parser="llama3",
    ) as cluster:
        yield cluster


def test_calls_of_tools(parsing: ScriptedCluster) -> None:
    script: Script = [(0, _chat_with_tools("called", _TOOL)), (0, _chat_with_tools("said", _TEXT))]
    (whole,) = (events_of(output) for output in parsing.play([script]))
    kinds = {rid: {n for _, d in e for n in _delta(d)} for rid, e in whole.items()}
    assert kinds == {"called": {"role", "tool_calls"}, "said": {"role", "content"}}
    _goes_on(parsing, script, whole)


def test_messages(parsing: ScriptedCluster) -> None:
    """Of Anthropic's API: several events belong to one record, and some records to none."""
    script: Script = [(0, _message(limit)) for limit in (1, 12, 30)]
    (whole,) = (events_of(output) for output in parsing.play([script]))
    for events in whole.values():
        names = [data.partition(b"\n")[0].removeprefix(b"event: ") for _, data in events]
        assert names[:2] == [b"message_start", b"content_block_start"]
        assert names[-3:] == [b"content_block_stop", b"message_delta", b"message_stop"]
    _goes_on(parsing, script, whole)


def _message(tokens: int) -> Call:
    body = {
        "messages": [{"role": "user", "content": "say something"}],
        "max_tokens": tokens,
        "temperature": 0.0,
        "stream": True,
    }
    return Call(f"{tokens} tokens", "messages", body, Journaled())


def _goes_on(
    cluster: ScriptedCluster, script: Script, whole: dict[str, list[Event]], parts: int = 8
) -> None:
    """Wherever they are left, the streams of its only member go on as they did by themselves."""
    for part in range(1, parts):
        counts = {rid: len(events) * part // parts for rid, events in whole.items()}
        (output,) = cluster.play([left_after(script, whole, counts)])
        for rid, events in events_of(output).items():
            got = [*whole[rid][: counts[rid]], *events]
            assert alike(events_by_choice(whole[rid]), events_by_choice(got)), (rid, counts[rid])


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedCluster]:
    """A member that thinks before it speaks, no longer than it is allowed to."""
    words = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>", "<|endoftext|>")
    model = tiny_model.build(tmp_path_factory.mktemp("thinker"), words=words)
    with small_cluster(
        tmp_path_factory.mktemp("thinking"),
        1,
        model,
        skip_tokenizer_init=False,
        reasoning_parser="qwen3",
        enable_strict_thinking=True,
    ) as cluster:
        yield cluster


def test_what_was_thought(thinking: ScriptedCluster) -> None:
    """It stays apart from what is said, and is counted; a grammar is for what is said alone."""
    script: Script = [
        (0, _thought("apart", 6)),
        (0, _thought("together", 6, separate_reasoning=False)),
        (0, _thought("at once", 6, stream_reasoning=False)),
        (0, _thought("without", 6, chat_template_kwargs={"enable_thinking": False})),
    ]
    (whole,) = (events_of(output) for output in thinking.play([script]))
    kinds = {rid: {n for _, d in e for n in _delta(d)} for rid, e in whole.items()}
    both, said = {"role", "reasoning_content", "content"}, {"role", "content"}
    assert kinds == {
        "apart": both,
        "together": said,
        "at once": both,
        "without": said,
    }
    _goes_on(thinking, script, whole)


def _thought(rid: str, budget: int, **asks: Any) -> Call:
    body = {
        "messages": [{"role": "user", "content": "say something"}],
        "temperature": 0.0,
        "max_completion_tokens": 40,
        "ignore_eos": True,
        "custom_params": {"thinking_budget": budget},
        "regex": "[a-z]{12}",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **asks,
    }
    return Call(rid, "chat", body, Journaled())


_TOOL = r'\{"name":"f","parameters":\{"a":"[a-z]{6}"\}\}'
_TEXT = "[a-z]{12}"


def _chat_with_tools(rid: str, regex: str) -> Call:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}
    body = {
        "messages": [{"role": "user", "content": "say something"}],
        "tools": [{"type": "function", "function": function}],
        "regex": regex,
        "temperature": 0.0,
        "max_completion_tokens": 200,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Call(rid, "chat", body, Journaled())


def _delta(data: bytes) -> dict[str, Any]:
    """What is in the delta of an event, by name."""
    if not data.startswith(b"data: {"):
        return {}
    choices = json.loads(data.removeprefix(b"data: "))["choices"]
    return {k: v for choice in choices for k, v in choice["delta"].items() if v}


@pytest.mark.parametrize("seed", SEEDS, ids=lambda s: f"seed-{s}")
def test_whatever_it_asks_for(talking_pair: ScriptedCluster, seed: int) -> None:
    rng = random.Random(seed)
    scripts = [all_streams(script) for script in calling_scripts(seed)]
    played = [events_of(output) for output in talking_pair.play(scripts)]
    left = [{rid: rng.randrange(1, len(e)) for rid, e in p.items() if e} for p in played]
    assert sum(map(len, left)) > 5
    again = talking_pair.play(
        [left_after(s, p, c) for s, p, c in zip(scripts, played, left, strict=True)]
    )
    for script, whole, counts, output in zip(scripts, played, left, again, strict=True):
        rest = events_of(output)
        for rid, count in counts.items():
            got = [*whole[rid][:count], *rest[rid]]
            wanted, had = events_by_choice(whole[rid]), events_by_choice(got)
            assert alike(wanted, had), f"{told(script, rid, count)}\n{wanted}\n{had}"


@pytest.mark.parametrize("seed", SEEDS, ids=lambda s: f"seed-{s}")
def test_whoever_asks_for_it_again(talking_pair: ScriptedCluster, seed: int) -> None:
    """The router ends anywhere in a stream, and the next one gets all of that stream."""
    rng = random.Random(seed)
    scripts = [all_streams(script) for script in calling_scripts(seed)]
    played = [events_of(output) for output in talking_pair.play(scripts)]
    lost = [{rid: rng.randrange(1, len(e) + 1) for rid, e in p.items() if e} for p in played]
    again = talking_pair.play([_lost(s, c) for s, c in zip(scripts, lost, strict=True)])
    for script, whole, counts, output in zip(scripts, played, lost, again, strict=True):
        got = events_of(output)
        for rid, count in counts.items():
            wanted, had = events_by_choice(whole[rid]), events_by_choice(got[rid])
            assert alike(wanted, had), f"{told(script, rid, count)}\n{wanted}\n{had}"
            assert [len(r) for r, _ in got[rid]] == [len(r) for r, _ in whole[rid]]


def _lost(script: Script, counts: dict[str, int]) -> Script:
    """Each call, of a router that ends after so many of its events."""
    return [
        (step, Call(call.rid, call.endpoint, call.body, Journaled(lost_after=counts[call.rid])))
        for step, call in script
        if isinstance(call, Call) and call.rid in counts
    ]

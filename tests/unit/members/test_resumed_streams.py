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

from kunserve_sglang.core.resumption import COMMENT, NOT_RESUMABLE
from tests.support.any_run import of_any_run
from tests.support.calls import calling_scripts
from tests.support.cluster import ScriptedCluster
from tests.support.identity import alike, small_cluster
from tests.support.schedules import Script
from tests.support.script import Call, Journaled, Output

SEEDS = range(int(os.environ.get("KUNSERVE_RESUMED", "2")))

Event = tuple[list[bytes], bytes]
"""The records before an event, and the event."""


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
    (whole,) = (_events(output) for output in parsing.play([script]))
    kinds = {rid: {n for _, d in e for n in _delta(d)} for rid, e in whole.items()}
    assert kinds == {"called": {"role", "tool_calls"}, "said": {"role", "content"}}
    for part in range(1, 8):
        counts = {rid: len(events) * part // 8 for rid, events in whole.items()}
        (output,) = parsing.play([_left(script, whole, counts)])
        for rid, events in _events(output).items():
            got = [*whole[rid][: counts[rid]], *events]
            assert alike(_by_choice(whole[rid]), _by_choice(got)), (rid, counts[rid])


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
    scripts = [_streams(script) for script in calling_scripts(seed)]
    played = [_events(output) for output in talking_pair.play(scripts)]
    left = [{rid: rng.randrange(1, len(e)) for rid, e in p.items() if e} for p in played]
    assert sum(map(len, left)) > 5
    again = talking_pair.play(
        [_left(s, p, c) for s, p, c in zip(scripts, played, left, strict=True)]
    )
    for script, whole, counts, output in zip(scripts, played, left, again, strict=True):
        rest = _events(output)
        for rid, count in counts.items():
            got = [*whole[rid][:count], *rest[rid]]
            wanted, had = _by_choice(whole[rid]), _by_choice(got)
            assert alike(wanted, had), f"{_told(script, rid, count)}\n{wanted}\n{had}"


@pytest.mark.parametrize("seed", SEEDS, ids=lambda s: f"seed-{s}")
def test_whoever_asks_for_it_again(talking_pair: ScriptedCluster, seed: int) -> None:
    """The router ends anywhere in a stream, and the next one gets all of that stream."""
    rng = random.Random(seed)
    scripts = [_streams(script) for script in calling_scripts(seed)]
    played = [_events(output) for output in talking_pair.play(scripts)]
    lost = [{rid: rng.randrange(1, len(e) + 1) for rid, e in p.items() if e} for p in played]
    again = talking_pair.play([_lost(s, c) for s, c in zip(scripts, lost, strict=True)])
    for script, whole, counts, output in zip(scripts, played, lost, again, strict=True):
        got = _events(output)
        for rid, count in counts.items():
            wanted, had = _by_choice(whole[rid]), _by_choice(got[rid])
            assert alike(wanted, had), f"{_told(script, rid, count)}\n{wanted}\n{had}"
            assert [len(r) for r, _ in got[rid]] == [len(r) for r, _ in whole[rid]]


def _lost(script: Script, counts: dict[str, int]) -> Script:
    """Each call, of a router that ends after so many of its events."""
    return [
        (step, Call(call.rid, call.endpoint, call.body, Journaled(lost_after=counts[call.rid])))
        for step, call in script
        if isinstance(call, Call) and call.rid in counts
    ]


def _streams(script: Script) -> Script:
    """Its calls, all as streams with journals."""
    calls = [(step, action) for step, action in script if isinstance(action, Call)]
    for _, call in calls:
        call.body["stream"] = True
        call.body.pop("return_meta_info", None)  # refused together
    return [(step, Call(c.rid, c.endpoint, c.body, Journaled())) for step, c in calls]


def _left(script: Script, whole: dict[str, list[Event]], counts: dict[str, int]) -> Script:
    """Each call once more, after so many of its events."""
    return [
        (step, _left_at(call, whole[call.rid], counts[call.rid]))
        for step, call in script
        if isinstance(call, Call) and call.rid in counts
    ]


def _left_at(call: Call, events: list[Event], count: int) -> Call:
    records = [record for before, _ in events[:count] for record in before]
    lines = b"".join(record + b"\n" for record in records)
    return Call(call.rid, call.endpoint, call.body, Journaled(lines, count))


def _events(output: dict[str, Output]) -> dict[str, list[Event]]:
    """By call; those that were answered with an error have none."""
    found: dict[str, list[Event]] = {}
    for rid, answer in output.items():
        status, *body = answer.received[-1]
        whole = b"".join(body) if status == 200 else b""
        found[rid] = [_event(block) for block in whole.split(b"\n\n")[:-1]]
    return found


def _event(block: bytes) -> Event:
    *comments, data = block.split(b"\n")
    assert all(comment.startswith(COMMENT) for comment in comments), block
    records = [comment.removeprefix(COMMENT) for comment in comments]
    assert NOT_RESUMABLE not in records
    return records, data


def _by_choice(events: list[Event]) -> dict[int, list[Any]]:
    """Choices of one answer come in an order of their own in each run."""
    found: dict[int, list[Any]] = {}
    for _, data in events:
        text = data.removeprefix(b"data: ")
        event = text if text == b"[DONE]" else json.loads(text)
        choices = event.get("choices") if isinstance(event, dict) else None
        where = event.get("index", -1) if isinstance(event, dict) else -1
        found.setdefault(choices[0]["index"] if choices else where, []).append(of_any_run(event))
    return found


def _told(script: Script, rid: str, count: int) -> str:
    (call,) = (c for _, c in script if isinstance(c, Call) and c.rid == rid)
    return f"{call.endpoint} left after {count} events: {call.body}"

"""Streams as they go to routers, and calls of routers that another one has left."""

from __future__ import annotations

import json
from typing import Any

from kunserve_sglang.core.resumption import COMMENT, NOT_RESUMABLE
from tests.support.any_run import of_any_run
from tests.support.schedules import Script
from tests.support.script import Call, Journaled, Output

Event = tuple[list[bytes], bytes]
"""The records before an event, and the event."""


def all_streams(script: Script) -> Script:
    """Its calls, all as streams with journals."""
    calls = [(step, action) for step, action in script if isinstance(action, Call)]
    for _, call in calls:
        call.body["stream"] = True
        call.body.pop("return_meta_info", None)  # refused together
    return [(step, Call(c.rid, c.endpoint, c.body, Journaled())) for step, c in calls]


def left_after(script: Script, whole: dict[str, list[Event]], counts: dict[str, int]) -> Script:
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


def events_of(output: dict[str, Output]) -> dict[str, list[Event]]:
    """By call; those that were answered with an error have none."""
    found: dict[str, list[Event]] = {}
    for rid, answer in output.items():
        status, *body = answer.received[-1]
        whole = b"".join(body) if status == 200 else b""
        found[rid] = [_event(block) for block in whole.split(b"\n\n")[:-1]]
    return found


def _event(block: bytes) -> Event:
    records = []
    while block.startswith(COMMENT):
        record, _, block = block.partition(b"\n")
        records.append(record.removeprefix(COMMENT))
    assert NOT_RESUMABLE not in records
    assert COMMENT not in block
    return records, block


def events_by_choice(events: list[Event]) -> dict[int, list[Any]]:
    """Choices of one answer come in an order of their own in each run."""
    found: dict[int, list[Any]] = {}
    for _, data in events:
        text = data.rpartition(b"data: ")[2]  # some have names as well
        event = text if text == b"[DONE]" else json.loads(text)
        choices = event.get("choices") if isinstance(event, dict) else None
        where = event.get("index", -1) if isinstance(event, dict) else -1
        found.setdefault(choices[0]["index"] if choices else where, []).append(of_any_run(event))
    return found


def told(script: Script, rid: str, count: int) -> str:
    (call,) = (c for _, c in script if isinstance(c, Call) and c.rid == rid)
    return f"{call.endpoint} left after {count} events: {call.body}"

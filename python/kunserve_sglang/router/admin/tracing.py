"""Recordings of what the instances do, as Chrome trace JSON (chrome://tracing, Perfetto)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from kunserve_sglang.api.types import Recording, TraceBody, TraceDetails
from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.core.errors import TransientError
from kunserve_sglang.core.messages import Span, Trace, Traced
from kunserve_sglang.router.http.answers import json_answer
from kunserve_sglang.router.http.bodies import check_instances, read_body

_ANSWER_TIMEOUT_S = 10.0


class TraceRunning(TransientError):
    """Another recording is under way; there is never more than one."""


class Tracing:
    """`POST /kunserve/trace`: records for a while, then answers with all spans."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control
        self._running = False

    async def record(self, request: Request) -> Response:
        body = await read_body(request, TraceBody)
        registry = self._control.registry
        asked = registry.with_agent() if body.instances is UNSET else set(body.instances)
        check_instances(registry, asked)
        wanted = sorted(asked)
        if self._running:
            raise TraceRunning("a recording is still running")
        self._running = True
        try:
            await self._tell(wanted, record=True)
            await asyncio.sleep(body.seconds)
            answers = await self._tell(wanted, record=False)
        finally:
            self._running = False
        lost = sum(a.lost for a in answers.values())
        spans = {i: a.spans for i, a in answers.items()}
        details = TraceDetails(
            began=time.time() - time.monotonic() + start_of(spans), lost_spans=lost
        )
        return json_answer(Recording(trace_events=chrome_events(spans), other_data=details))

    async def _tell(self, instances: Sequence[int], *, record: bool) -> dict[int, Traced]:
        hub = self._control.hub
        calls = [Trace(call=hub.next_call(), record=record) for _ in instances]
        answers = await asyncio.gather(
            *(hub.call(i, c, _ANSWER_TIMEOUT_S) for i, c in zip(instances, calls, strict=True))
        )
        return {i: a for i, a in zip(instances, answers, strict=True) if isinstance(a, Traced)}


def start_of(spans: Mapping[int, Sequence[Span]]) -> float:
    """The earliest moment in all of them, in monotonic seconds."""
    return min((s.start for many in spans.values() for s in many), default=0.0)


def chrome_events(spans: Mapping[int, Sequence[Span]]) -> list[dict[str, Any]]:
    """Complete events in microseconds, one process an instance, the earliest span at 0."""
    start = start_of(spans)
    events: list[dict[str, Any]] = []
    for instance, many in sorted(spans.items()):
        name = {"name": f"instance {instance}"}
        events.append({"name": "process_name", "ph": "M", "pid": instance, "args": name})
        events += [
            {
                "name": s.name,
                "ph": "X",
                "pid": instance,
                "tid": 0,
                "ts": round(1e6 * (s.start - start), 1),
                "dur": round(1e6 * s.duration, 1),
                "args": s.details,
            }
            for s in many
        ]
    return events

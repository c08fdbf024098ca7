"""Things that go wrong with one request, at every step in which an instance deals with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer


class Broken(Exception):
    """What is thrown: no class that anything in the product knows."""


_Concerns = Callable[..., bool]


def _request(rid: str) -> _Concerns:
    return lambda request, *_, **__: request.rid == rid


def _batch(rid: str) -> _Concerns:
    return lambda batch, *_, **__: any(request.rid == rid for request in batch.reqs)


def _many(rid: str) -> _Concerns:
    return lambda requests, *_, **__: any(request.rid == rid for request in requests)


def _as_long(least: str) -> _Concerns:
    """A stage knows no names, so its request is told by its length."""
    return lambda batch, *_, **__: bool((batch.seq_lens >= int(least)).any())


POINTS: dict[str, tuple[type | str, str, Callable[[str], _Concerns]]] = {
    "taken in": ("", "init_req_max_new_tokens", _request),
    "prefix looked up": (Req, "init_next_round_input", _request),
    "batch prepared": (ScheduleBatch, "prepare_for_extend", _batch),
    "step prepared": (ScheduleBatch, "prepare_for_decode", _batch),
    "layers and sampling": ("tp_worker", "forward_batch_generation", _batch),
    "end looked for": (Req, "update_finish_state", _request),
    "layers of a peer": ("engine", "run_stage", _as_long),
    "output sent": (SchedulerOutputStreamer, "_stream_output_generation", _many),
}
"""Where it fails -> class or part of the scheduler, method, and which calls concern the request."""


@contextmanager
def broken(scheduler: Any, point: str, rid: str) -> Iterator[None]:
    """Everything of this kind fails that has to do with the request."""
    where, name, concerns = POINTS[point]
    owner = where
    if isinstance(where, str):
        owner = getattr(scheduler, where) if where else scheduler
    original, concerned = getattr(owner, name), concerns(rid)
    first = 1 if owner is SchedulerOutputStreamer else 0

    def failing(*arguments: Any, **named: Any) -> Any:
        if concerned(*arguments[first:], **named):
            raise Broken(point)
        return original(*arguments, **named)

    with patch.object(owner, name, failing):
        yield

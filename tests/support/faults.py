"""Faults on purpose: `POINTS`, where one request fails, and `PLANTED`, wrong answers.

A test shows that the others go on where one fails, and that wrong answers are noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any
from unittest.mock import patch

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler_components.logprob_result_processor import (
    SchedulerLogprobResultProcessor,
)
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from kunserve_sglang.sglang_seam import penalties
from kunserve_sglang.sglang_seam.launched import Launched


class Broken(Exception):
    """What is thrown: no class that anything in the product knows."""


_Concerns = Callable[..., bool]


def _request(rid: str) -> _Concerns:
    return lambda request, *_, **__: request.rid == rid


def _batch(rid: str) -> _Concerns:
    return lambda batch, *_, **__: any(request.rid == rid for request in batch.reqs)


def _many(rid: str) -> _Concerns:
    return lambda requests, *_, **__: any(request.rid == rid for request in requests)


def _forward(rid: str) -> _Concerns:
    return lambda _logits, batch, *_, **__: rid in batch.rids


def _as_long(least: str) -> _Concerns:
    """A stage knows no names, so its request is told by its length."""
    return lambda batch, *_, **__: bool((batch.seq_lens >= int(least)).any())


POINTS: dict[str, tuple[type | str, str, Callable[[str], _Concerns]]] = {
    "taken in": ("", "init_req_max_new_tokens", _request),
    "prefix looked up": (Req, "init_next_round_input", _request),
    "batch prepared": (ScheduleBatch, "prepare_for_extend", _batch),
    "step prepared": (ScheduleBatch, "prepare_for_decode", _batch),
    "layers and sampling": ("tp_worker", "forward_batch_generation", _batch),
    "sampling": ("tp_worker.model_runner", "sample", _forward),
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
        owner = attrgetter(where)(scheduler) if where else scheduler
    original, concerned = getattr(owner, name), concerns(rid)
    first = 1 if owner is SchedulerOutputStreamer else 0

    def failing(*arguments: Any, **named: Any) -> Any:
        if concerned(*arguments[first:], **named):
            raise Broken(point)
        return original(*arguments, **named)

    with patch.object(owner, name, failing):
        yield


def _record_read_late(_: Any) -> Any:
    """A chunk's result is read by the record as it is when it comes, not when it was launched."""
    return patch.object(Launched, "restored", lambda _: nullcontext())


def _logprobs_of_another_chunk(scheduler: Any) -> Any:
    """In cooperative mode the logprobs of a prompt's chunk are put before those of earlier ones."""
    add = SchedulerLogprobResultProcessor.add_input_logprob_return_values

    def misplacing(*args: Any, last_prefill_chunk: bool) -> None:
        request, count = args[2], args[5]
        add(*args, last_prefill_chunk=last_prefill_chunk)
        if scheduler.engine.cooperating and not last_prefill_chunk:
            values = request.input_token_logprobs
            values[:] = values[-count:] + values[:-count]

    return patch.object(
        SchedulerLogprobResultProcessor, "add_input_logprob_return_values", misplacing
    )


def _penalties_late(scheduler: Any) -> Any:
    """In cooperative mode a token is counted a step after it should be."""
    count = ScheduleBatch.cumulate_penalty_output_tokens

    def late(batch: Any) -> None:
        if not scheduler.engine.cooperating:
            count(batch)
            return
        tokens = [[*r.origin_input_ids[-2:], *r.output_ids][-2] for r in batch.reqs]
        orchestrator = batch.sampling_info.penalizer_orchestrator
        orchestrator.cumulate_output_tokens(torch.tensor(tokens, device=batch.device))

    return patch.object(ScheduleBatch, "cumulate_penalty_output_tokens", late)


def _penalties_forgotten(_: Any) -> Any:
    """After a retraction nothing of what a request has produced is counted."""
    return patch.object(penalties, "_with_outputs", lambda fresh, _: fresh)


def _stop_strings_in_one_token(_: Any) -> Any:
    """A string to stop at is looked for in the last token's text alone."""
    return patch.object(Req, "_stop_match_tail_len", lambda *_: 1)


def _usage_of_one_more(scheduler: Any) -> Any:
    """In cooperative mode a token more than there are is reported."""
    sender = scheduler.output_streamer.send_to_detokenizer
    send = sender.send_output

    def reporting(output: Any, *rest: Any) -> None:
        if scheduler.engine.cooperating:
            output.completion_tokens = [count + 1 for count in output.completion_tokens]
        send(output, *rest)

    return patch.object(sender, "send_output", reporting)


def _chunk_held_back(scheduler: Any) -> Any:
    """The first that a stream would get after a change of mode comes with the second."""
    stream = SchedulerOutputStreamer._stream_output_generation
    before = scheduler.engine.cooperating

    def holding(streamer: Any, requests: Any, *rest: Any) -> None:
        nonlocal before
        now = scheduler.engine.cooperating
        kept = requests if now == before else [r for r in requests if r.finished()]
        before = now
        stream(streamer, kept, *rest)

    return patch.object(SchedulerOutputStreamer, "_stream_output_generation", holding)


def _longer_when_retracted(_: Any) -> Any:
    """A request that was retracted may produce as many tokens again as it has produced."""
    reset = Req.reset_for_retract

    def longer(request: Any) -> None:
        reset(request)
        request.sampling_params.max_new_tokens += len(request.output_ids)

    return patch.object(Req, "reset_for_retract", longer)


PLANTED: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "record read late": _record_read_late,
    "logprobs of another chunk": _logprobs_of_another_chunk,
    "penalties late": _penalties_late,
    "penalties forgotten": _penalties_forgotten,
    "stop strings in one token": _stop_strings_in_one_token,
    "usage of one more": _usage_of_one_more,
    "chunk held back": _chunk_held_back,
    "longer when retracted": _longer_when_retracted,
}
"""What is wrong -> how to make it so in a scheduler, until the context ends."""


def wedge(scheduler: Any) -> None:
    """SGLang believes that there is no room, and nothing makes it look again."""
    scheduler.running_batch.batch_is_full = True
    scheduler.waiting._seen = scheduler.waiting._situation(scheduler.running_batch)

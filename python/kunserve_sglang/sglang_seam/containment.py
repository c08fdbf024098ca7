"""A failure while a batch is formed, run or applied ends the request that it belongs to.

What an exception leaves behind is unknown: slots that nobody records, results that are applied in
part. So everything that requests hold is taken away at once and all of them wait again, with what
they have produced, as after a retraction: their clients see a pause. Then those that were in the
batch are tried apart from all others, and halved until the failure comes back with a single one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from kunserve_sglang.core.errors import KunServeError
from kunserve_sglang.execution.suspects import Suspects
from kunserve_sglang.sglang_seam.scheduling import Scheduling

logger = logging.getLogger(__name__)

REQUEST_FAILED = "RequestFailed"
"""The type of the error that ends a request which the instance cannot serve."""

_MAX_FAILURES = 32
"""In a row, with no group of suspects found innocent between: then it is not the requests."""


@dataclass(frozen=True, slots=True)
class _ContainedStep:
    """What was done, in words that go on after "while", and for which requests."""

    name: str
    requests: list[Any]


class Containment:
    """Keeps failures from the requests that have no part in them."""

    def __init__(self, scheduler: Scheduling) -> None:
        self.failures = 0
        self._scheduler = scheduler
        self._suspects: Suspects[Any] = Suspects()
        self._in_a_row = 0
        self._step: _ContainedStep | None = None
        self._failed: _ContainedStep | None = None

    @contextlib.contextmanager
    def doing(self, name: str, requests: list[Any]) -> Iterator[None]:
        """Around work on `requests`: what fails in it is the fault of one of them.

        Steps within a step belong to it.
        """
        if self._step is not None:
            yield
            return
        self._step, self._failed = _ContainedStep(name, list(requests)), None
        try:
            yield
        except Exception as error:
            if not isinstance(error, KunServeError):
                self._failed = self._step
            raise
        finally:
            self._step = None

    @contextlib.contextmanager
    def contained(self) -> Iterator[None]:
        """Around turns of the loop: goes on after what has failed in a step.

        Everything else is raised: failures outside of steps, and of KunServe itself.
        """
        try:
            yield
        except Exception as error:
            step, self._failed = self._failed, None
            if step is None:
                raise
            self.contain(step.name, step.requests, error)

    @contextlib.contextmanager
    def taking_in(self, request: Any) -> Iterator[None]:
        """Around the arrival of a request, which is in no queue yet."""
        try:
            yield
        except Exception as error:
            if isinstance(error, KunServeError) or not isinstance(request.rid, str):
                raise
            self.failures += 1
            logger.exception("request %s failed while it was taken in", request.rid)
            self.answer(request, _failure("taking it in", error))

    def passed(self, batch: Any) -> None:
        """The result of this batch has been applied."""
        if self._suspects and batch.chunked_req is None and self._suspects.passed(batch.reqs):
            self._in_a_row = 0

    def look_again(self, fits: Callable[[Any], bool]) -> None:
        """Before requests are admitted: nobody is to wait for suspects that cannot run.

        `fits` says whether one that waits could be admitted.
        """
        if not self._suspects:
            return
        scheduler = self._scheduler
        waiting, running = scheduler.waiting_queue, scheduler.requests_with_slots()
        there = {*waiting, *running}
        self._suspects.keep(there.__contains__)
        tried = [r for r in there if self._suspects.may_run(r)]
        if self._suspects and not any(r in running or fits(r) for r in tried):
            self._suspects.clear()

    def may_run(self, request: Any) -> bool:
        """Whether it may be admitted now: while some are tried, only these."""
        return self._suspects.may_run(request)

    def contain(self, step: str, requests: list[Any], error: Exception) -> None:
        """End whose fault it is, if that is known by now; let all others wait to go on.

        Raises `error` after too many in a row, and in an instance with other ranks, which know
        nothing of it.
        """
        self.failures += 1
        self._in_a_row += 1
        scheduler = self._scheduler
        if self._in_a_row > _MAX_FAILURES or scheduler.ranks.size > 1:
            raise error
        logger.error("failed while %s of %d requests", step, len(requests), exc_info=error)
        everybody = scheduler.take_back_everything(requests)
        guilty = self._suspects.failed([r for r in requests if not r.finished()])
        if guilty is not None:
            logger.error(
                "request %s ends with an error: %d tokens of prompt, %d of output, %s",
                guilty.rid,
                len(guilty.origin_input_ids),
                len(guilty.output_ids),
                guilty.sampling_params,
            )
            guilty.finished_reason = _failure(step, error)
            self.answer(guilty, guilty.finished_reason)
            self._in_a_row = 0
        self._answer_ended([r for r in everybody if r.finished() and r is not guilty], step, error)
        scheduler.wait_again([r for r in everybody if not r.finished()])

    def _answer_ended(self, requests: list[Any], step: str, error: Exception) -> None:
        """Those that have come to their end in the step that failed, and have not been answered."""
        unanswered = [r for r in requests if not r.finished_output]
        if not unanswered:
            return
        with_logprobs = any(r.return_logprob for r in unanswered)
        try:
            self._scheduler.output_streamer.stream_output(unanswered, with_logprobs)
        except Exception:
            logger.exception("%d answers cannot be sent", len(unanswered))
            for request in unanswered:
                self.answer(request, _failure(step, error))

    def answer(self, request: Any, reason: Any) -> None:
        """Tell a client why its request has ended, outside of what a step sends."""
        answer = AbortReq(rid=request.rid, finished_reason=reason.to_json())
        self._scheduler.ipc_channels.send_to_tokenizer.send_output(answer, request)


def _failure(step: str, error: Exception) -> Any:
    """What its client is told; the rest is for the log."""
    message = f"the server failed while {step} with this request: {type(error).__name__}"
    return FINISH_ABORT(message, HTTPStatus.INTERNAL_SERVER_ERROR, REQUEST_FAILED)

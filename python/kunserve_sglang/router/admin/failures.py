"""What a caller is told when one of our own endpoints raises an error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from kunserve_sglang.control.coordinator import TransitionRunning
from kunserve_sglang.control.draining import DrainTimeout, NotDrained
from kunserve_sglang.control.hub import NoAnswer
from kunserve_sglang.policy.planner import NoPlan
from kunserve_sglang.router.admin.tracing import TraceRunning
from kunserve_sglang.router.http.answers import Code, RequestError, error_answer

Handler = Callable[[Request, Exception], Awaitable[Response]]


def failure(scope: Scope, error: Exception) -> Response:
    """For an error that nobody expected."""
    message = f"{scope['method']} {scope['path']}: {type(error).__name__} in the router"
    return error_answer(500, "internal_error", message)


def _told(status: int, code: Code) -> Handler:
    """Answers with what the error says."""

    async def answer(request: Request, error: Exception) -> Response:  # noqa: ARG001
        return error_answer(status, code, str(error))

    return answer


async def _request_error(request: Request, error: Exception) -> Response:  # noqa: ARG001
    assert isinstance(error, RequestError)
    return error.answer()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code: Code = "method_not_allowed" if error.status_code == 405 else "not_found"
    message = f"{request.method} {request.scope['path']}: {error.detail}"
    return error_answer(error.status_code, code, message, headers=error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    """The bug itself goes to the log."""
    return failure(request.scope, error)


FAILURES: Mapping[type[Exception], Handler] = {
    RequestError: _request_error,
    NoPlan: _told(409, "no_plan"),
    TransitionRunning: _told(409, "transition_running"),
    TraceRunning: _told(409, "trace_running"),
    NotDrained: _told(409, "drain_refused"),
    DrainTimeout: _told(504, "drain_timeout"),
    NoAnswer: _told(504, "no_answer"),
    HTTPException: _http_error,
    Exception: _internal_error,
}
"""How each is answered; the most special of an error's classes counts."""

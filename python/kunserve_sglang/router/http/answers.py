"""The router's own HTTP answers: JSON, and one shape for every error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from kunserve_sglang.api.types import ErrorAnswer, ErrorDetail
from kunserve_sglang.core.errors import KunServeError

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "overloaded_error",
    431: "invalid_request_error",
    500: "internal_error",
    501: "not_supported_error",
    502: "upstream_error",
    503: "unavailable_error",
    504: "timeout_error",
    505: "not_supported_error",
}

_RETRY_AFTER_S = 1

Code = Literal[
    "admin_key_required",
    "api_key_required",
    "bad_idempotency_key",
    "bad_json",
    "bad_limit",
    "bad_path",
    "bad_priority",
    "bad_request",
    "bodies_too_large",
    "body_too_large",
    "drain_refused",
    "drain_timeout",
    "foreign_site",
    "headers_too_large",
    "idempotency_key_reused",
    "instance_failed",
    "internal_error",
    "invalid_field",
    "method_not_allowed",
    "no_answer",
    "no_instance",
    "no_number",
    "no_plan",
    "not_json",
    "not_found",
    "not_ready",
    "not_supported",
    "other_model",
    "plain_instance",
    "queue_displaced",
    "queue_full",
    "queue_timeout",
    "read_key_required",
    "request_under_way",
    "router_stopping",
    "stream_lost",
    "tenant_queue_full",
    "tenants_unreadable",
    "trace_running",
    "too_many_connections",
    "too_slow",
    "transition_running",
    "unhealthy",
    "unknown_class",
    "unknown_instance",
    "unknown_worker",
    "upstream_lost",
    "worker_exists",
]
"""What programs tell errors apart by; docs/features.md says what each means."""


class RequestError(KunServeError):
    """The caller must change the request; becomes the answer with this status."""

    def __init__(self, status: int, code: Code, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.field = field

    def answer(self) -> Response:
        return error_answer(self.status, self.code, str(self), field=self.field)


def json_answer(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`content` may hold structs and enums."""
    return Response(
        msgspec.json.encode(content),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def error_answer(
    status: int,
    code: Code,
    message: str,
    *,
    field: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """`code` is for programs and never changes, `message` is for people."""
    detail = ErrorDetail(
        message=message,
        type=ERROR_TYPES[status],
        code=code,
        field=UNSET if field is None else field,
    )
    return json_answer(ErrorAnswer(error=detail), status, headers)


def error_event(path: str, status: int, code: Code, message: str) -> bytes:
    """The last event of a stream that does not come to its end, wherever it stands.

    As the API of this path has it: clients of Anthropic's go by the names of events.
    """
    detail = ErrorDetail(message=message, type=ERROR_TYPES[status], code=code)
    if path == "/v1/messages":
        named = msgspec.json.encode({"type": "error", "error": detail})
        return b"\n\nevent: error\ndata: %b\n\n" % named
    return b"\n\ndata: %b\n\n" % msgspec.json.encode(ErrorAnswer(error=detail))


def retry_later(
    code: Code, message: str, status: int = 503, after_s: int = _RETRY_AFTER_S
) -> Response:
    """For a condition that passes; clients are told when to come back."""
    return error_answer(status, code, message, headers={"Retry-After": str(after_s)})

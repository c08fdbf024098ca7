"""A client's request as a question to instances, whose answers are read whole."""

from __future__ import annotations

from starlette.requests import Request

from kunserve_sglang.control.upstream import Question
from kunserve_sglang.router.http.heads import request_headers


async def question_of(request: Request, path: str | None = None) -> Question:
    """A client's request as a question, to its own path unless another is given."""
    return Question(
        method=request.method,
        path=path or request.scope["path"],
        query=request.scope["query_string"].decode(),
        headers=[
            (name, value)
            for name, value in request_headers(request.headers.raw)
            if name != "accept-encoding"  # the answer will be read here
        ],
        body=await request.body(),
    )

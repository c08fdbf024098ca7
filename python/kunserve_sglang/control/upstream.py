"""Questions of our own to instances, with small whole answers; what their refusals mean."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from yarl import URL

from kunserve_sglang.control.registry import Instance
from kunserve_sglang.router.http.heads import request_headers, target

REFUSED = "connection refused"
"""Why an instance is lost when nobody listens at its address any more."""

CONNECT_TIMEOUT_S = 5.0

KEEP_ALIVE_S = 3.0
"""Below the 5 s after which SGLang closes an idle connection: a POST must not run into that."""

BACKPRESSURE = frozenset({429, 503})
"""With these an instance says that it is busy, and not that it is dead."""

QUEUE_FULL = (
    b"The request queue is full.",
    b"The request is aborted by a higher priority request.",
)
"""What SGLang says of a request that it has not run, because of `--max-queued-requests`."""


def open_session() -> aiohttp.ClientSession:
    """For our own questions; adds nothing to them and limits nothing but connects."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
    )


def instance_url(instance: Instance, path: bytes, query: bytes) -> URL:
    """Raises `ValueError` unless `path` is absolute: any other could name another host."""
    return URL(instance.url.rstrip("/") + target(path, query).decode("latin-1"), encoded=True)


def is_refusal(error: BaseException) -> bool:
    """Whether nobody listens at the address; other failures say nothing about the instance."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return isinstance(error, OSError) and error.errno == errno.ECONNREFUSED


@dataclass(slots=True)
class BusyAnswer:
    """An instance's 429 or 503; names of headers are in lower case."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""

    @property
    def queue_full(self) -> bool:
        """Whether SGLang says with it that the request never left its queue."""
        return any(message in self.body for message in QUEUE_FULL)

    def response(self, retry_after_s: int) -> Response:
        """As it goes to the client; it always says when to come again."""
        answer = Response(self.body, self.status)
        answer.raw_headers = self.headers
        if all(name != b"retry-after" for name, _ in self.headers):
            answer.raw_headers.append((b"retry-after", str(retry_after_s).encode()))
        return answer


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A request whose answers are read whole."""

    method: str
    path: str
    query: str = ""
    headers: list[tuple[str, str]] = []
    body: bytes = b""


def credentials(api_key: str | None) -> list[tuple[str, str]]:
    """Headers of a question that the router asks on its own account."""
    return [("authorization", f"Bearer {api_key}")] if api_key else []


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


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What one instance answered; status 0 and an `error` if there was no answer."""

    instance: int
    status: int = 0
    content_type: str = ""
    body: bytes = b""
    error: str = ""

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def failure(self) -> str:
        """One line on what went wrong."""
        said = self.error or f"answered {self.status}: {self.body[:300].decode(errors='replace')}"
        return f"instance {self.instance} {said}"


async def ask(
    session: aiohttp.ClientSession, instance: Instance, question: Question, timeout_s: float
) -> Reply:
    """One instance's answer; never raises for what goes wrong on the way."""
    try:
        async with session.request(
            question.method,
            instance_url(instance, question.path.encode(), question.query.encode()),
            headers=question.headers,
            data=question.body or None,
            allow_redirects=False,  # nobody but the instance is asked, least of all with its key
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S),
        ) as response:
            return Reply(
                instance=instance.number,
                status=response.status,
                content_type=response.headers.get("Content-Type", ""),
                body=await response.read(),
            )
    except TimeoutError:
        return Reply(instance=instance.number, error=f"did not answer within {timeout_s:g} s")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        reason = REFUSED if is_refusal(error) else f"could not be asked: {error}"
        return Reply(instance=instance.number, error=reason)


async def ask_all(
    session: aiohttp.ClientSession,
    instances: Sequence[Instance],
    question: Question,
    timeout_s: float,
) -> list[Reply]:
    """All instances at once; the replies are in their order."""
    return await asyncio.gather(*(ask(session, i, question, timeout_s) for i in instances))

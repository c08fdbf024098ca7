"""Questions of our own to instances, with small whole answers."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence

import aiohttp
import msgspec
from yarl import URL

from kunserve_sglang.control.registry import Instance

CONNECT_TIMEOUT_S = 5.0

KEEP_ALIVE_S = 3.0
"""Below the 5 s after which SGLang closes an idle connection: a POST must not run into that."""

HEALTH_TIMEOUT_S = 30.0
"""Above the 20 s that SGLang takes to find itself unhealthy."""

_SILENCES = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT)


def open_session(*, kept: bool = True) -> aiohttp.ClientSession:
    """For our own questions; adds nothing to them and limits nothing but connects.

    With `kept` connections wait for a next question, otherwise each has one of its own.
    """
    connector = (
        aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        if kept
        else aiohttp.TCPConnector(limit=0, force_close=True)
    )
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
    )


def target(path: bytes, query: bytes) -> bytes:
    """The target of a request line.

    Raises `ValueError` unless `path` is absolute: any other could name another host.
    """
    if not path.startswith(b"/"):
        raise ValueError(f"{path!r} is no absolute path")
    return path + b"?" + query if query else path


def instance_url(instance: Instance, path: bytes, query: bytes) -> URL:
    """Raises `ValueError` unless `path` is absolute: any other could name another host."""
    return URL(instance.url.rstrip("/") + target(path, query).decode("latin-1"), encoded=True)


def is_refusal(error: BaseException) -> bool:
    """Whether nobody listens at the address; other failures say nothing about the instance."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return isinstance(error, OSError) and error.errno == errno.ECONNREFUSED


def is_silence(error: BaseException | None) -> bool:
    """Whether the host does not answer; a kernel does, even for a process that is stopped."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return isinstance(error, OSError) and error.errno in _SILENCES


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


def _as_for(instance: Instance, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Headers with the key that is for `instance` alone, if it has one of its own."""
    if instance.key is None:
        return headers
    others = [header for header in headers if header[0].lower() != "authorization"]
    return [*others, *credentials(instance.key)]


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What one instance answered; status 0 and an `error` if there was no answer.

    `refused` says that nobody listens at its address, `unreachable` that nothing there answers at
    all.
    """

    instance: int
    status: int = 0
    content_type: str = ""
    body: bytes = b""
    error: str = ""
    refused: bool = False
    unreachable: bool = False

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def failure(self) -> str:
        """One line on what went wrong."""
        said = self.error or f"answered {self.status}: {self.body[:300].decode(errors='replace')}"
        return f"instance {self.instance} {said}"


async def ask(
    session: aiohttp.ClientSession,
    instance: Instance,
    question: Question,
    timeout_s: float,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    read_timeout_s: float | None = None,
) -> Reply:
    """One instance's answer; never raises for what goes wrong on the way.

    All of it may take `timeout_s`; once connected, nothing may be missing for `read_timeout_s`.
    """
    try:
        async with session.request(
            question.method,
            instance_url(instance, question.path.encode(), question.query.encode()),
            headers=_as_for(instance, question.headers),
            data=question.body or None,
            allow_redirects=False,  # nobody but the instance is asked, least of all with its key
            timeout=aiohttp.ClientTimeout(
                total=timeout_s, sock_connect=connect_timeout_s, sock_read=read_timeout_s
            ),
        ) as response:
            return Reply(
                instance=instance.number,
                status=response.status,
                content_type=response.headers.get("Content-Type", ""),
                body=await response.read(),
            )
    except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError) as error:
        refused = is_refusal(error)
        reason = "connection refused" if refused else "could not be reached"
        return Reply(
            instance=instance.number,
            error=reason,
            refused=refused,
            unreachable=isinstance(error, TimeoutError) or is_silence(error),
        )
    except TimeoutError:
        limit = min(timeout_s, read_timeout_s or timeout_s)
        return Reply(instance=instance.number, error=f"did not answer within {limit:g} s")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return Reply(instance=instance.number, error=f"could not be asked: {error}")


async def ask_all(
    session: aiohttp.ClientSession,
    instances: Sequence[Instance],
    question: Question,
    timeout_s: float,
) -> list[Reply]:
    """All instances at once; the replies are in their order."""
    return await asyncio.gather(*(ask(session, i, question, timeout_s) for i in instances))

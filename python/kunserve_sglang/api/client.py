"""HTTP to the router: one call, one answer, and errors that say what to do."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec

from kunserve_sglang.api.calls import CALLS
from kunserve_sglang.api.errors import Refused, Unreachable, Usage
from kunserve_sglang.api.types import Body, ErrorAnswer

_CONNECT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 10.0

_CALLS = {call.name: call for call in CALLS}

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """A success: its status, and the body as it came."""

    status: int
    body: bytes
    url: str

    def read(self, kind: type[T]) -> T:
        """The body as one of the API's types; raises `Unreachable` if it is something else."""
        try:
            return msgspec.json.decode(self.body, type=kind)
        except msgspec.DecodeError as error:
            raise Unreachable(f"what answers at {self.url} is no such router: {error}") from None


class RouterClient:
    """Calls one router, by `http://`, `https://` or `unix://` with the path of a socket.

    `key` goes with every call; each has a connection of its own.
    """

    def __init__(self, url: str, key: str | None) -> None:
        """Raises `Usage` for what is no URL. Proxies are not used: this talks to one's own."""
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        try:
            parts = urlsplit(self.url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError as error:
            raise Usage(f"--url {url}: {error}") from None
        self._socket = parts.path if parts.scheme == "unix" else None
        if self._socket is None and (parts.scheme not in ("http", "https") or not self._host):
            raise Usage(f"--url {url}: expected http://host:port or https://host:port")
        self._secure = parts.scheme == "https"
        self._prefix = "" if self._socket else parts.path
        self._headers = {"Accept": b"application/json", "Content-Type": b"application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key.strip()}".encode()

    def call(
        self,
        name: str,
        body: Body | None = None,
        *,
        query: Mapping[str, str] | None = None,
        path: Mapping[str, str] | None = None,
        timeout_s: float = _ANSWER_TIMEOUT_S,
    ) -> Answer:
        """Make the call of this name in `api.calls`; `timeout_s` is for the answer to begin.

        `path` fills what stands in braces in the call's path.
        Raises `Refused` for an answer that is no success, `Unreachable` if there is none.
        """
        call = _CALLS[name]
        target = (
            self._prefix
            + call.path.format_map(path or {})
            + (f"?{urlencode(query)}" if query else "")
        )
        data = None if body is None else msgspec.json.encode(body)
        status, content = self._ask(call.method, target, data, timeout_s)
        if status >= 400:
            raise Refused(_reason(status, content))
        if status not in call.answers:
            raise Unreachable(f"{self.url} answered {status}: is this the router's address?")
        return Answer(status, content, self.url)

    def _connection(self) -> http.client.HTTPConnection:
        if self._socket is not None:
            return _UnixConnection(self._socket)
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=_CONNECT_TIMEOUT_S)

    def _ask(
        self, method: str, target: str, data: bytes | None, timeout_s: float
    ) -> tuple[int, bytes]:
        connection = self._connection()
        try:
            connection.connect()
            connection.sock.settimeout(timeout_s)
            connection.request(method, target, data, self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        except TimeoutError:
            raise Unreachable(f"{self.url} did not answer in time") from None
        except OSError as error:
            reason = error.strerror or error
            raise Unreachable(f"cannot reach {self.url}: {reason}") from None
        except http.client.HTTPException as error:
            raise Unreachable(f"{self.url} speaks no HTTP, or broke off: {error!r}") from None
        finally:
            connection.close()


class _UnixConnection(http.client.HTTPConnection):
    """To a socket of this host, by its path."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_CONNECT_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _reason(status: int, content: bytes) -> str:
    try:
        error = msgspec.json.decode(content, type=ErrorAnswer).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return f"{status}: {content[:300].decode(errors='replace') or 'no reason given'}"
    hint = ""
    if error.code in ("admin_key_required", "read_key_required"):
        kind = error.code.split("_")[0]
        hint = f" (give --{kind}-api-key or KUNSERVE_{kind.upper()}_API_KEY)"
    return f"{status} {error.code}: {error.message}{hint}"

"""A request while it is being read: its head is checked before its body is taken."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Scope

from kunserve_sglang.router.http.answers import Code, error_answer, retry_later
from kunserve_sglang.router.http.limits import Limits, Pace

_FEW_DIGITS = 8
"""A body whose length has fewer is below every limit."""

_MOST_DIGITS = 20
"""Of 64 bits; what is longer some servers cut, whatever it begins with."""

_VERSIONS = frozenset({"1.0", "1.1"})


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a request is refused before all of it has been read."""

    status: int
    code: Code
    message: str

    def answer(self) -> Response:
        if self.status == 503:
            return retry_later(self.code, self.message)
        return error_answer(self.status, self.code, self.message)


class Incoming:
    """One request of a connection, as far as it has come."""

    __slots__ = (
        "_around",
        "_first_read",
        "_limits",
        "_pace",
        "body",
        "body_bytes",
        "by_name",
        "head_done",
        "headers",
        "moved",
        "target",
        "version",
    )

    def __init__(self, limits: Limits, now: float, first_read: int) -> None:
        """`first_read` is the size of the read in which it begins."""
        self.target = b""
        self.version = ""
        self.headers: list[tuple[bytes, bytes]] = []
        self.by_name: dict[bytes, bytes] = {}
        self.head_done = False
        self.body: list[bytes] = []
        self.body_bytes = 0
        self.moved = 0
        self._pace = Pace(now, 0)
        self._limits = limits
        self._around = 0
        self._first_read = first_read

    def part(self, part: bytes) -> None:
        self.body.append(part)
        self.body_bytes += len(part)
        self._around = 0

    def arrived(self, size: int) -> None:
        """So many bytes of the connection have been read, of body and all that surrounds it."""
        self.moved += size
        self._around += size

    def stalled(self, now: float) -> bool:
        """Whether its client has sent too little of it lately."""
        return self._pace.stalled(now, self.moved, self._limits)

    def go_on(self, now: float) -> None:
        """Nobody could wait for the rest until now."""
        self._pace = Pace(now, self.moved)

    def oversize(self) -> Fault | None:
        """What is too large of what has come until now."""
        if self._around > self._limits.head:
            return Fault(431, "headers_too_large", "the headers, or the trailers, are too large")
        if self.body_bytes > self._limits.body:
            return self._too_large()
        return None

    def head_fault(self, version: str) -> Fault | None:
        """What is wrong with a whole head; `version` is that of HTTP. Fills in `by_name`."""
        self.head_done, self.version = True, version
        if version not in _VERSIONS:
            return Fault(505, "not_supported", f"HTTP/{version}: this router speaks HTTP/1.1")
        known = self.by_name = dict(self.headers)
        if (
            len(known) == len(self.headers) < self._limits.headers
            and b"host" in known
            and b"transfer-encoding" not in known
            and len(known.get(b"content-length", b"")) < _FEW_DIGITS
            and self._first_read + self.moved <= self._limits.head
        ):
            return None  # nearly all are like this
        names = [name for name, _ in self.headers]
        hosts = names.count(b"host")
        if hosts > 1 or (not hosts and version == "1.1"):
            return Fault(400, "bad_request", "Host: exactly one is expected")
        if b"transfer-encoding" in names and (fault := self._coding_fault(version, names)):
            return fault
        size = len(self.target) + sum(map(len, names)) + sum([len(v) for _, v in self.headers])
        if size > self._limits.head or len(names) > self._limits.headers:
            return Fault(431, "headers_too_large", "the headers are too large, or too many")
        if b"content-length" in names:
            length = known[b"content-length"]
            if len(length) > _MOST_DIGITS:
                return Fault(400, "bad_request", "Content-Length: too many digits to be read alike")
            if length.isdigit() and int(length) > self._limits.body:
                return self._too_large()
        return None

    def _coding_fault(self, version: str, names: list[bytes]) -> Fault | None:
        if version == "1.0":
            return Fault(400, "bad_request", "Transfer-Encoding: HTTP/1.0 has none")
        if b"content-length" in names:
            return Fault(
                400, "bad_request", "Content-Length and Transfer-Encoding: one is expected"
            )
        given = b",".join(value for name, value in self.headers if name == b"transfer-encoding")
        codings = [coding.strip().lower() for coding in given.split(b",")]
        if codings[-1] != b"chunked":
            return Fault(400, "bad_request", "Transfer-Encoding: the last has to be `chunked`")
        if len(codings) > 1:
            return Fault(501, "not_supported", "Transfer-Encoding: only `chunked` is known")
        return None

    def _too_large(self) -> Fault:
        message = f"the body is larger than {self._limits.body >> 20} MiB"
        return Fault(413, "body_too_large", message)

    def wants_continue(self) -> bool:
        return b"expect" in self.by_name and any(
            name == b"expect" and value.lower() == b"100-continue" for name, value in self.headers
        )

    def whole_body(self) -> bytes:
        return self.body[0] if len(self.body) == 1 else b"".join(self.body)

    def scope(
        self, method: bytes, scheme: str, peer: tuple[str, int], here: tuple[str, int]
    ) -> Scope:
        """As ASGI has it."""
        raw_path, _, query = self.target.partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": self.version,
            "method": method.decode("ascii"),
            "scheme": scheme,
            "path": raw_path.decode("latin-1"),  # as it stands: what is encoded is another path
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": self.headers,
            "client": peer,
            "server": here,
        }

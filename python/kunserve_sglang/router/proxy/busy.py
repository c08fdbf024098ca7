"""How an instance says that it is busy, and whether it has refused the request unseen."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import Response

BACKPRESSURE = frozenset({429, 503})
"""With these an instance says that it is busy, and not that it is dead."""

QUEUE_FULL = (
    b"The request queue is full.",
    b"The request is aborted by a higher priority request.",
)
"""What SGLang says of a request that it has not run, because of `--max-queued-requests`."""


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

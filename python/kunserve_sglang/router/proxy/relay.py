"""An instance's answer on its way to the client; runs for every chunk of every stream."""

from __future__ import annotations

from kunserve_sglang.core.resumption import JOURNAL_HEADER
from kunserve_sglang.router.http.client_request import ClientRequest
from kunserve_sglang.router.http.heads import Headers, answer_headers
from kunserve_sglang.router.proxy.busy import BACKPRESSURE, BusyAnswer
from kunserve_sglang.router.proxy.journal import Journal
from kunserve_sglang.router.proxy.latency import Latency, StreamTimer
from kunserve_sglang.router.proxy.promise import Promise

_MAX_HELD_DIGITS = 6
"""Of the length of an answer that is held: below a megabyte."""


class Relay:
    """Where one instance's answer to one request goes.

    That it is busy is kept in `busy`: there may be another to try. The status of a redirect is kept
    in `redirect`, and nothing of it goes on: it names addresses that only instances know. An answer
    of moderate and known length goes on once it is whole: no client can use a part of it, and as
    long as nothing was delivered another instance may still answer. With a `journal`, the records
    in a stream go there. `unfit` is the status of an answer with which a stream that has begun
    cannot go on.
    """

    __slots__ = (
        *("_held", "_journal", "_latency", "_promise", "_request", "_start", "_timer"),
        *("busy", "redirect", "unfit"),
    )

    def __init__(
        self,
        request: ClientRequest,
        latency: Latency,
        promise: Promise,
        journal: Journal | None = None,
    ) -> None:
        self._request = request
        self._journal = journal
        self._latency = latency
        self._promise = promise
        self._timer: StreamTimer | None = None
        self._start: tuple[int, Headers] | None = None
        self._held: list[bytes] = []
        self.busy: BusyAnswer | None = None
        self.redirect = 0
        self.unfit = 0

    def head(self, status: int, headers: Headers) -> None:
        journal, self._journal = self._journal, None
        if status in BACKPRESSURE:
            self.busy = BusyAnswer(status, answer_headers(headers))
            return
        if 300 <= status < 400 and status != 304:
            self.redirect = status
            return
        known = dict(headers)
        if journal is not None and JOURNAL_HEADER in known:
            journal.kept = True
            self._journal = journal
        if self._request.started:
            if self._journal is None or status != 200:
                self.unfit = status
            else:
                self._timer = self._promise.timer  # it is the same stream, and had a pause
            return
        if 0 < len(known.get(b"content-length", b"")) <= _MAX_HELD_DIGITS:
            self._start = status, answer_headers(headers)
            return
        self._request.start(status, answer_headers(headers))
        # Tokens come as they are made; of other answers the first chunk says nothing.
        if status == 200 and known.get(b"content-type", b"").startswith(b"text/event-stream"):
            self._request.streams = True
            promise, arrived = self._promise, self._request.arrived
            self._timer = promise.timer = StreamTimer(self._latency, arrived, promise.first_chunk)

    def body(self, data: bytes) -> None:
        timer = self._timer
        if timer is None or self._journal is not None or not data:
            data = self._taken(data)
        else:  # of a stream that goes on as it comes, as most chunks are
            timer.chunk(data)
        self._request.write(data)

    def end(self, last: bytes) -> None:
        last = self._taken(last)
        if self.busy is not None or self.redirect or self.unfit:
            return
        if self._start is not None:
            self._request.start(*self._start)
            last = b"".join(self._held)
            self._promise.whole = last
        elif self._journal is not None:
            last += self._journal.rest()
        self._request.end(last)

    def _taken(self, data: bytes) -> bytes:
        """What of it goes to the client now."""
        if self._timer is not None and data:
            self._timer.chunk(data)
        if self._journal is not None:
            return self._journal.pass_on(data)
        if self.busy is not None:
            self.busy.body += data
        elif self._start is not None:
            self._held.append(data)
        elif not (self.redirect or self.unfit):
            return data
        return b""

"""One answer that is made for all who ask for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import chain

from starlette.types import Message

from kunserve_sglang.core.kept_answers import AnswerName
from kunserve_sglang.core.resumption import reports_error
from kunserve_sglang.sglang_seam.listening import Listener
from kunserve_sglang.sglang_seam.transcript import Transcript

_BYTES_PER_ANSWER = 4096
"""What an answer takes in memory besides what was sent of it."""


class SharedAnswer:
    """One answer: as far as it has been made, and who waits for it.

    `kept` as long as others can have it from its beginning, and `unfit` says that they should not.
    `counted` are the bytes of its `size` that are in the sum of all.
    """

    def __init__(self, wanted: AnswerName, body: bytes) -> None:
        self.name, self.request = wanted.name, wanted.request
        self.listeners: set[Listener] = set()
        self.transcript = Transcript()
        self.counted = 0
        self.kept = True
        self.whole = self.unfit = False
        self.failure: Exception | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._start: Message | None = None
        self._body: bytes | None = body
        self._given_up = asyncio.Event()

    async def receive(self) -> Message:
        """What its maker gets to know of a client: the request, and that it is given up."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._given_up.wait()
        return {"type": "http.disconnect"}

    @property
    def size(self) -> int:
        return _BYTES_PER_ANSWER + self.transcript.size

    def add(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            self.unfit = message["status"] != 200
        else:
            body = bytes(message.get("body", b""))
            self.unfit = self.unfit or reports_error(body)
            self.whole = not message.get("more_body", False)
            if self.kept and body:
                self.transcript.add(body)
        for listener in self.listeners:
            listener.tell(message)
        if self.whole:
            self.transcript.end()
            self.end()

    def listener(self) -> Listener:
        """A further one, who gets all of it."""
        listener = Listener(self._so_far(), ended=self.whole)
        self.listeners.add(listener)
        return listener

    def _so_far(self) -> Iterator[Message]:
        """What has been sent until now, whatever comes meanwhile."""
        start = [] if self._start is None else [self._start]
        pieces = (_body(piece, more=True) for piece in self.transcript.so_far())
        return chain(start, pieces, [_body(b"", more=False)] if self.whole else [])

    def end(self) -> None:
        """There is nothing to come."""
        for listener in self.listeners:
            listener.end()

    def give_up(self) -> None:
        """As if its client had left."""
        self._given_up.set()

    async def taken(self) -> None:
        """Until all who listen have it: whoever reads slowly must not make it pile up here."""
        for listener in list(self.listeners):
            await listener.taken()


def _body(piece: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": piece, "more_body": more}

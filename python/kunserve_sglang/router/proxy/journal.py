"""What the router keeps of a stream under way, so that another instance can go on with it."""

from __future__ import annotations

import re

import msgspec

from kunserve_sglang.core.resumption import (
    COMMENT,
    JOURNAL_HEADER,
    NOT_RESUMABLE,
    RESUMABLE_PATHS,
    RESUME_HEADER,
    Resumption,
)
from kunserve_sglang.router.http.client_request import ClientRequest

_BYTES_PER_RECORD = 48
"""What a record takes in memory besides its bytes."""

_STEP = 4096
"""What a journal takes at least, and at once, of the memory of all."""

_CREATED = re.compile(rb'"created":\s*(\d+)')
_DONE = b"data: [DONE]"
_WITHOUT = COMMENT + NOT_RESUMABLE


class Journal:
    """Of one request: the records of its stream, and how much of that its client has got.

    It is `kept` if the instance puts records into the stream, and `whole` as long as none is
    missing here. `events` have been delivered, each of them in one piece.
    """

    __slots__ = (
        *("_budget", "_created", "_last", "_records", "_room", "_tail", "_taken"),
        *("events", "kept", "whole"),
    )

    def __init__(self, budget: Journals) -> None:
        self.kept = False
        self.whole = True
        self.events = 0
        self._budget = budget
        self._records: list[bytes] = []
        self._taken = self._room = 0
        self._tail = b""
        self._last = b""
        self._created = 0

    def pass_on(self, data: bytes) -> bytes:
        """What of a stream goes to its client now: whole events, without the records in them."""
        if self._room > 0 and not self._tail and data.startswith(COMMENT):
            # Nearly always it is one event with one record, and this runs for every chunk.
            record, _, event = data.partition(b"\n")
            alone = 0 < event.find(b"\n\n") == len(event) - 2
            if alone and not event.startswith(COMMENT) and record != _WITHOUT:
                self._room -= len(record) + _BYTES_PER_RECORD
                self._records.append(record)
                self.events += 1
                self._last = event
                return event
        return self._pass_on(data)

    def _pass_on(self, data: bytes) -> bytes:
        """The same, however it comes."""
        if self._tail:
            data = self._tail + data
        end = data.rfind(b"\n\n")
        if end < 0:
            self._tail = data
            return b""
        self._tail = data[end + 2 :]
        events = data[:end].split(b"\n\n")
        for i, event in enumerate(events):
            if event.startswith(COMMENT):
                events[i] = self._without_records(event)
        if not self.events:
            self._created = _created(events[0])
        self.events += len(events)
        self._last = events[-1]
        events.append(b"")
        return b"\n\n".join(events)

    def rest(self) -> bytes:
        """What is left at the end of a stream that is whole, should its last event lack an end."""
        return self._without_records(self._tail)

    @property
    def delivered(self) -> bool:
        """Whether its client has got all of it, whatever became of the instance."""
        return self._last.startswith(_DONE)

    @property
    def resumable(self) -> bool:
        """Whether another instance can go on, from the beginning if there is nothing to go on with.

        To be asked of a stream that has begun.
        """
        return self.kept and (self.whole or not self.events)

    def question(self, body: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Body and further headers of a request that begins the stream, or resumes it."""
        self._tail = b""  # half an event was not delivered, and comes again
        if not self.events:
            self._forget()
            self.whole = True
            return body, []
        resumption = Resumption(len(body), self.events, self._created)
        headers = [(RESUME_HEADER, msgspec.json.encode(resumption))]
        return b"".join([body, *(r[len(COMMENT) :] + b"\n" for r in self._records)]), headers

    def close(self) -> None:
        """The request has its answer, or will get none."""
        self._forget()
        self.whole = False

    def _without_records(self, event: bytes) -> bytes:
        while event.startswith(COMMENT):
            record, _, event = event.partition(b"\n")
            if self.whole:
                self._keep(record)
        return event

    def _keep(self, record: bytes) -> None:
        self._room -= len(record) + _BYTES_PER_RECORD
        self._records.append(record)
        if record == _WITHOUT:
            self.close()
        elif self._room <= 0:
            # In large steps, so that most records need not be counted among those of all streams.
            taken = _STEP - self._room
            if self._budget.used + taken > self._budget.limit:
                self.close()
            else:
                self._taken += taken
                self._room += taken
                self._budget.used += taken

    def _forget(self) -> None:
        self._budget.used -= self._taken
        self._taken = self._room = 0
        self._records.clear()


def _created(event: bytes) -> int:
    found = _CREATED.search(event)
    return int(found[1]) if found else 0


class Journals:
    """Of all streams under way: together they take no more than `limit` bytes, and take `used`."""

    def __init__(self, limit: int, instance_key: str) -> None:
        """`instance_key` is what instances know the router by."""
        self.limit = limit
        self.used = 0
        self._asking = (JOURNAL_HEADER, instance_key.encode())

    def of(self, request: ClientRequest) -> Journal | None:
        """One for a request that may ask for a stream which can be resumed; to be closed."""
        streams = request.wants_stream is not False  # what is no boolean may be taken for one
        if self.limit and streams and request.scope["path"] in RESUMABLE_PATHS:
            return Journal(self)
        return None

    def question(
        self, request: ClientRequest, journal: Journal | None
    ) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Body and further headers as they go to an instance now."""
        if journal is None:
            return request.body, []
        body, headers = journal.question(request.body)
        return body, [self._asking, *headers]

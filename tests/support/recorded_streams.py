"""Streams of mock instances that write down what another needs to go on with them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kunserve_sglang.core.resumption import (
    COMMENT,
)
from tests.support.mock_instance import MockInstance
from tests.support.mock_worker import MockWorker
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

BODY = {"text": "x", "stream": True}


def event(number: int) -> bytes:
    return b'data: {"created": %d, "n": %d}\n\n' % (100 + number, number)


def with_record(number: int) -> bytes:
    return b"%brecord %d\n%b" % (COMMENT, number, event(number))


class Stream:
    """One of a client's, and the instance that has it."""

    def __init__(self, router: RouterCluster) -> None:
        self.router = router
        self.connection = router.open("POST", "/generate", BODY)
        self.owner = self.moved(None)
        self._response: http.client.HTTPResponse | None = None

    @property
    def response(self) -> http.client.HTTPResponse:
        self._response = self._response or self.connection.getresponse()
        return self._response

    def moved(self, before: MockInstance | None) -> MockInstance:
        """Who has it now, and is not who had it before."""

        def owners() -> list[MockInstance]:
            return [i for i in self.router.instances if i.worker.streams and i is not before]

        until(owners)
        return owners()[0]

    def gets(self, expected: bytes) -> None:
        got = b""
        while len(got) < len(expected):
            part = self.response.read1(len(expected) - len(got))
            assert part, got
            got += part
        assert got == expected

    def rest(self) -> bytes:
        """All that comes, and then the connection is closed before its end."""
        with pytest.raises(http.client.IncompleteRead) as cut:
            self.response.read()
        return cut.value.partial

    def last_error(self) -> dict[str, str]:
        *_, last, nothing = self.rest().split(b"\n\n")
        assert not nothing
        error: dict[str, str] = json.loads(last.removeprefix(b"data: "))["error"]
        assert error["code"] == "stream_lost"
        return error


@contextmanager
def begun(router: RouterCluster, *chunks: bytes) -> Iterator[Stream]:
    stream = Stream(router)
    for chunk in chunks:
        stream.owner.worker.emit(chunk)
    try:
        yield stream
    finally:
        stream.connection.close()


def asked(worker: MockWorker) -> tuple[dict[str, str], bytes]:
    request = worker.requests("/generate")[-1]
    return request.headers, request.body

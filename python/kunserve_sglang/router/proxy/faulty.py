"""Requests and answers that get lost on purpose, in a router in which there are faults."""

from __future__ import annotations

from kunserve_sglang.core import faults
from kunserve_sglang.core.fault_points import FaultKind
from kunserve_sglang.router.http.heads import Headers
from kunserve_sglang.router.http.outbound import BrokenOff, InstanceConnection, Sink


class FaultySink:
    """Where an answer goes, unless it breaks off on its way."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def head(self, status: int, headers: Headers) -> None:
        self._sink.head(status, headers)

    def body(self, data: bytes) -> None:
        if data:
            _relayed()
        self._sink.body(data)

    def end(self, last: bytes) -> None:
        _relayed()
        self._sink.end(last)


def with_faults(connection: InstanceConnection, sink: Sink) -> Sink:
    """To be called before a request goes to an instance; its answer is to go where this says."""
    if not faults.armed():
        return sink
    if faults.at("proxy.sent") is FaultKind.DROP:
        connection.close()
    return FaultySink(sink)


def _relayed() -> None:
    """The event loop closes a connection whose protocol raises, and the request hears of it."""
    if faults.at("proxy.relayed") is FaultKind.DROP:
        raise BrokenOff("broke off on purpose")

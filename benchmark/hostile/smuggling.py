"""Requests that two servers may read in two ways, and what three proxies make of them.

For every message of the corpus a proxy has to refuse it, or to send on one request that means what
the message means. `meaning` is what a strict reader finds in it, a target and a body; None where
the only right answer is a refusal.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from benchmark.hostile.raw_http import exchange
from benchmark.hostile.smuggling_corpus import CORPUS, Message
from benchmark.hostile.worker import Arrived, StrictWorker

_SETTLE_S = 0.05
_ASKED_BY_PROXIES = frozenset(
    ("/health", "/get_model_info", "/get_server_info", "/model_info", "/server_info")
)


class Made(StrEnum):
    """What a proxy made of a message."""

    REFUSED = "not sent on"
    SENT_ON = "sent on"
    TAKEN = "sent on, though it has no one meaning"
    CHANGED = "sent on with another meaning"
    SPLIT = "sent on as several"
    BROKEN = "sent on unreadably"

    @property
    def safe(self) -> bool:
        return self in (Made.REFUSED, Made.SENT_ON)


@dataclass(slots=True)
class Backend:
    """The one server that all proxies are before, and what has arrived there."""

    worker: StrictWorker
    arrived: list[Arrived]

    @classmethod
    async def start(cls) -> Backend:
        arrived: list[Arrived] = []
        worker = StrictWorker(arrived.append)
        await worker.start()
        return cls(worker, arrived)

    def take(self) -> list[Arrived]:
        """What has arrived since the last time, without the proxies' own questions."""
        found = [a for a in self.arrived if _is_a_clients(a)]
        self.arrived.clear()
        return found


def _is_a_clients(arrived: Arrived) -> bool:
    return arrived.method != "PRI" and arrived.target not in _ASKED_BY_PROXIES


async def outcomes(port: int, backend: Backend) -> dict[str, Made]:
    """Of the proxy at this port, by the name of the message."""
    found = {}
    for message in CORPUS:
        backend.take()
        unreadable = backend.worker.unreadable
        await exchange(port, message.sent)
        await asyncio.sleep(_SETTLE_S)  # what is left over follows, if anything does
        broken = backend.worker.unreadable > unreadable
        found[message.name] = _made(message, backend.take(), broken=broken)
    return found


def _made(message: Message, arrived: Sequence[Arrived], *, broken: bool) -> Made:
    if not arrived:
        return Made.BROKEN if broken else Made.REFUSED
    if len(arrived) > message.requests:
        return Made.SPLIT
    if broken:
        return Made.BROKEN
    if message.meaning is None:
        return Made.TAKEN
    target, body = message.meaning
    same = arrived[0].target == target and _means(arrived[0].body, body)
    return Made.SENT_ON if same else Made.CHANGED


def _means(found: bytes, body: bytes) -> bool:
    """The same bytes, or the same object with defaults filled in."""
    try:
        return found == body or json.loads(found).items() >= json.loads(body).items()
    except (ValueError, AttributeError):
        return False


def compare(by_proxy: dict[str, dict[str, Made]]) -> dict[str, Any]:
    """Figures for each proxy, and the messages that they do not agree about."""
    names = list(by_proxy)
    differ = {
        message.name: {name: by_proxy[name][message.name] for name in names}
        for message in CORPUS
        if len({by_proxy[name][message.name] for name in names}) > 1
    }
    return {
        "messages": len(CORPUS),
        "unsafe": {n: sum(not made.safe for made in by_proxy[n].values()) for n in names},
        "refused": {n: sum(m is Made.REFUSED for m in by_proxy[n].values()) for n in names},
        "differences": differ,
    }

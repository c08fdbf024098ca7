"""The router's end of the control plane: calls with deadlines, over a line that may lose any."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from kunserve_sglang.control.control_socket import ControlLine
from kunserve_sglang.control.plausible import check_sender
from kunserve_sglang.core import faults
from kunserve_sglang.core.dropped import Dropped
from kunserve_sglang.core.errors import TransientError
from kunserve_sglang.core.messages import (
    Abort,
    Attainable,
    CacheReport,
    Commit,
    Done,
    Greet,
    Hello,
    Leave,
    Lost,
    Prepare,
    Status,
    Trace,
    Traced,
    Vote,
    Welcome,
    connection_name,
    decode_to_router,
    encode,
)

logger = logging.getLogger(__name__)

Call = Prepare | Commit | Abort | Trace
Answer = Vote | Done | Traced

_ANSWER_TO: dict[type[Call], type[Answer]] = {
    Prepare: Vote,
    Commit: Done,
    Abort: Done,
    Trace: Traced,
}

_AGAIN_S = 0.5
"""A call is sent again after so long without an answer; members answer each of them alike."""

_MAX_FIRST_CALL = 1 << 48


class NoAnswer(TransientError):
    """An instance did not answer a call before its deadline."""


class _Waiting(NamedTuple):
    """Who was asked what, and where the answer goes."""

    instance: int
    call: Call
    future: asyncio.Future[Answer]

    def takes(self, identity: bytes, answer: Answer) -> bool:
        """Whether this is the answer: by who says it, by what it is, and of which epoch."""
        return (
            identity == connection_name(self.instance)
            and type(answer) is _ANSWER_TO[type(self.call)]
            and getattr(answer, "epoch", None) == _epoch(self.call)
        )


class ControlHub:
    """Receives hellos and status records, and matches answers to calls."""

    def __init__(self, line: ControlLine) -> None:
        self._line = line
        self.tcp = line.tcp
        # Answers to a router that is not any more must not be taken for those to this one.
        self._calls = itertools.count(1 + secrets.randbelow(_MAX_FIRST_CALL))
        self._pending: dict[int, _Waiting] = {}
        self._dropped = Dropped("message")

    @property
    def malformed(self) -> int:
        """Messages that could not be used."""
        return self._dropped.count

    def next_call(self) -> int:
        """A number for the `call` field of a message."""
        return next(self._calls)

    async def run(
        self,
        on_hello: Callable[[Hello], Welcome | Leave],
        on_status: Callable[[Status], Greet | None],
        on_cache: Callable[[CacheReport], None],
    ) -> None:
        """Serve for good; the callbacks run on the event loop and must not block.

        What `on_hello` and `on_status` return is the answer. A callback raises
        `msgspec.ValidationError` for what cannot be true.
        """
        while True:
            identity, data = await self._line.receive()
            try:
                message = decode_to_router(data)
                if isinstance(message, Hello | Status | CacheReport):
                    check_sender(identity, message)
                if faults.loses("control", message):
                    continue
                if isinstance(message, Hello):
                    await self._send(identity, on_hello(message))
                elif isinstance(message, Status):
                    if (answer := on_status(message)) is not None:
                        await self._send(identity, answer)
                elif isinstance(message, CacheReport):
                    on_cache(message)
                else:
                    self._answered(identity, message)
            except msgspec.DecodeError as error:
                self._dropped.because(f"{error} (of {identity!r})")
            except Exception as error:  # one message, and there are others to be heard
                self._dropped.because(error)
                logger.exception("a message of %r was not understood", identity)

    def _answered(self, identity: bytes, answer: Answer) -> None:
        waiting = self._pending.get(answer.call)
        if waiting is None or waiting.future.done():
            return  # too late
        if waiting.takes(identity, answer):
            waiting.future.set_result(answer)
        else:
            self._dropped.because(f"an answer that {identity!r} was not asked for")

    async def watch_ends(self, on_end: Callable[[], None]) -> None:
        """Serve for good: `on_end` runs when a connection has ended, with its process perhaps."""
        while True:
            await self._line.ended()
            on_end()

    async def call(
        self, instance: int, message: Call, timeout_s: float, *, insist: bool = False
    ) -> Answer:
        """Send one command, again and again since it may get lost, and wait for its answer.

        Raises `NoAnswer` after `timeout_s`, or as soon as the instance is gone. So it does if the
        instance is not connected, unless it is to `insist`: then it may be so again.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._pending[message.call] = _Waiting(instance, message, future)
        deadline = loop.time() + timeout_s
        try:
            while (left := deadline - loop.time()) > 0:
                if not await self._send(connection_name(instance), message) and not insist:
                    raise NoAnswer(f"instance {instance} is not connected")
                await asyncio.wait({future}, timeout=min(left, _AGAIN_S))
                if future.done():
                    return future.result()
            kind = type(message).__name__.upper()
            raise NoAnswer(f"instance {instance} did not answer {kind} within {timeout_s:g} s")
        finally:
            del self._pending[message.call]

    def give_up(self, instance: int) -> None:
        """It is gone: whoever waits for an answer of it gets `NoAnswer` now."""
        for waiting in self._pending.values():
            if waiting.instance == instance and not waiting.future.done():
                waiting.future.set_exception(NoAnswer(f"instance {instance} is gone"))

    async def tell(
        self, instance: int, message: Welcome | Leave | Lost | Abort | Attainable
    ) -> bool:
        """Send what needs no answer; false if the instance is not connected."""
        return await self._send(connection_name(instance), message)

    async def _send(self, identity: bytes, message: msgspec.Struct) -> bool:
        return faults.loses("control", message) or await self._line.send(identity, encode(message))

    def close(self) -> None:
        self._line.close()


def _epoch(call: Call) -> int | None:
    """Of the transition that a call is about; None for one that is about none."""
    if isinstance(call, Prepare):
        return call.transition.epoch
    return None if isinstance(call, Trace) else call.epoch

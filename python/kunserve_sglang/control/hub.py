"""The router's end of the control plane: one ROUTER socket, calls with deadlines."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils.monitor import recv_monitor_message

from kunserve_sglang.core.errors import TransientError
from kunserve_sglang.core.keys import Admission, ClusterKeys
from kunserve_sglang.core.messages import (
    Abort,
    Attainable,
    CacheReport,
    Commit,
    Done,
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

    def __init__(
        self, address: str, *, tcp: str | None = None, keys: ClusterKeys | None = None
    ) -> None:
        """`address` is for this host, `tcp` for others as well: members only, by `keys`."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # A restarted instance takes over the name of the one that died.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # Say so when a message is for somebody whose connection has ended.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.tcp = ""
        self._doorkeeper: AsyncioAuthenticator | None = None
        if tcp is not None and keys is not None:
            self._doorkeeper = AsyncioAuthenticator(self._context)
            self._doorkeeper.start()
            self._doorkeeper.configure_curve_callback(
                "*", credentials_provider=Admission(keys.members)
            )
            keys.secure(self._socket)
            self._socket.bind(tcp)
            self.tcp = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        # Answers to a router that is not any more must not be taken for those to this one.
        self._calls = itertools.count(1 + secrets.randbelow(_MAX_FIRST_CALL))
        self._pending: dict[int, _Waiting] = {}
        self.malformed = 0

    def next_call(self) -> int:
        """A number for the `call` field of a message."""
        return next(self._calls)

    async def run(
        self,
        on_hello: Callable[[Hello], Welcome | Leave],
        on_status: Callable[[Status], None],
        on_cache: Callable[[CacheReport], None],
    ) -> None:
        """Serve for good; the callbacks run on the event loop and must not block.

        What `on_hello` returns is the answer to it.
        """
        while True:
            identity, data = await self._socket.recv_multipart()
            try:
                message = decode_to_router(data)
            except (msgspec.DecodeError, UnicodeDecodeError):
                self.malformed += 1
                continue
            try:
                if isinstance(message, Hello):
                    await self._send(identity, on_hello(message))
                elif isinstance(message, Status):
                    on_status(message)
                elif isinstance(message, CacheReport):
                    on_cache(message)
                else:
                    self._answered(identity, message)
            except Exception:  # one message, and there are others to be heard
                self.malformed += 1
                logger.exception("a %s of %r was not understood", type(message).__name__, identity)

    def _answered(self, identity: bytes, answer: Answer) -> None:
        waiting = self._pending.get(answer.call)
        if waiting is None or waiting.future.done():
            return  # too late
        if waiting.takes(identity, answer):
            waiting.future.set_result(answer)
        else:
            self.malformed += 1

    async def watch_ends(self, on_end: Callable[[], None]) -> None:
        """Serve for good: `on_end` runs when a connection has ended, with its process perhaps."""
        monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            while True:
                await recv_monitor_message(monitor)
                on_end()
        finally:
            self._socket.disable_monitor()
            monitor.close(linger=0)

    async def call(self, instance: int, message: Call, timeout_s: float) -> Answer:
        """Send one command and wait for its answer.

        Raises `NoAnswer` after `timeout_s`, or as soon as the instance is gone.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[message.call] = _Waiting(instance, message, future)
        try:
            if not await self._send(connection_name(instance), message):
                raise NoAnswer(f"instance {instance} is not connected")
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            kind = type(message).__name__.upper()
            raise NoAnswer(
                f"instance {instance} did not answer {kind} within {timeout_s:g} s"
            ) from None
        finally:
            del self._pending[message.call]

    def give_up(self, instance: int) -> None:
        """It is gone: whoever waits for an answer of it gets `NoAnswer` now."""
        for waiting in self._pending.values():
            if waiting.instance == instance and not waiting.future.done():
                waiting.future.set_exception(NoAnswer(f"instance {instance} is gone"))

    async def tell(self, instance: int, message: Welcome | Leave | Lost | Attainable) -> bool:
        """Send what needs no answer; false if the instance is not connected."""
        return await self._send(connection_name(instance), message)

    async def _send(self, identity: bytes, message: msgspec.Struct) -> bool:
        try:
            await self._socket.send_multipart([identity, encode(message)])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def close(self) -> None:
        self._socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.stop()
        self._context.term()


def _epoch(call: Call) -> int | None:
    """Of the transition that a call is about; None for one that is about none."""
    if isinstance(call, Prepare):
        return call.transition.epoch
    return None if isinstance(call, Trace) else call.epoch

"""The instance's end of the control plane: one socket to the router, never blocking."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import zmq

from kunserve_sglang.core import faults
from kunserve_sglang.core.addresses import is_ipv6
from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.heartbeats import watch_other_end
from kunserve_sglang.core.keys import MemberKeys
from kunserve_sglang.core.messages import (
    Greet,
    Hello,
    Lost,
    ToInstance,
    ToRouter,
    Welcome,
    connection_name,
    decode_to_instance,
    encode,
)
from kunserve_sglang.core.sockets import PollHandle

_HELLO_INTERVAL_S = 5.0
"""The greeting is repeated for good: a router that is started again has to learn of its instances.

It asks those who report to it; this is for what gets lost."""


class Control(Protocol):
    """The line to the router, as an agent needs it."""

    @property
    def malformed(self) -> int:
        """Messages that could not be read."""
        ...

    @property
    def poll_handles(self) -> list[PollHandle]:
        """For a `zmq.Poller`: one is readable when a command waits."""
        ...

    def send(self, message: ToRouter) -> None:
        """It may get lost; does not wait for a router that is not there, or does not listen."""
        ...

    def receive(self, timeout_s: float = 0.0) -> ToInstance | None:
        """The next command, or None. A message that cannot be decoded is counted and skipped."""
        ...

    def check_for_losses(self, epoch: int) -> None:
        """Raises `PeerLost` if the router has said that the group of this layout has come apart.

        For whoever waits for a peer in the middle of something. All commands stay to be received.
        """
        ...

    def close(self) -> None: ...


class ControlLink:
    """DEALER socket towards the router's ROUTER; says hello by itself."""

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        hello: Hello,
        keys: MemberKeys | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """A router on another host asks for `keys`; `now` is when to greet, in seconds."""
        self._now = now
        self._hello = hello
        self._next_hello = 0.0
        self._welcome = False
        self.malformed = 0
        self._waiting: deque[ToInstance] = deque()
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, connection_name(hello.instance))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDTIMEO, 0)
        watch_other_end(self._socket)
        if keys is not None and not address.startswith("ipc:"):
            keys.secure_link(self._socket)
        self._socket.ipv6 = is_ipv6(address)
        self._socket.connect(address)

    @property
    def poll_handles(self) -> list[PollHandle]:
        return [self._socket]

    def send(self, message: ToRouter) -> None:
        if faults.loses("member", message):
            return
        # Minutes of reports have room; a router that is away for longer has no use for more.
        with contextlib.suppress(zmq.Again):
            self._socket.send(encode(message))

    def receive(self, timeout_s: float = 0.0) -> ToInstance | None:
        self._greet()
        return self._waiting.popleft() if self._waiting else self._read(timeout_s)

    def check_for_losses(self, epoch: int) -> None:
        while (message := self._read(0.0)) is not None:
            self._waiting.append(message)
        for message in self._waiting:
            if isinstance(message, Lost) and message.broken == epoch:
                raise PeerLost(message.reason)

    def close(self) -> None:
        self._socket.close()

    def _read(self, timeout_s: float) -> ToInstance | None:
        while self._socket.poll(int(timeout_s * 1000)):
            try:
                message = decode_to_instance(self._socket.recv())
            except msgspec.DecodeError:
                self.malformed += 1
                continue
            if faults.loses("member", message):
                continue
            if isinstance(message, Greet):
                self._next_hello = 0.0
                self._greet()
                continue
            if isinstance(message, Welcome):
                self._welcome = True
                if not message.report_cache:
                    continue
            return message
        return None

    def _greet(self) -> None:
        now = self._now()
        if now >= self._next_hello:
            self._next_hello = now + (_HELLO_INTERVAL_S if self._welcome else 0.25)
            self.send(self._hello)

"""Two instances as the control plane sees them: they say hello, report, and refuse to move."""

from __future__ import annotations

import asyncio
from collections import Counter

import zmq
import zmq.asyncio

from kunserve_sglang.core.layout import Layout
from kunserve_sglang.core.messages import (
    Prepare,
    ToRouter,
    Vote,
    connection_name,
    decode_to_instance,
    encode,
)
from kunserve_sglang.testing.mock_member import NO_LOAD, hello, status, whole

_REPORT_INTERVAL_S = 0.5


class MemberMock:
    """Counts what the router sends; in peace it has no reason to send anything but a welcome."""

    def __init__(self, number: int, url: str) -> None:
        self.number = number
        self.received: Counter[str] = Counter()
        self._url = url
        self._context = zmq.asyncio.Context()

    def start(self, control_address: str) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, connection_name(self.number))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(control_address)
        self._tasks = [
            asyncio.create_task(self._report()),
            asyncio.create_task(self._receive()),
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._context.term()

    async def send(self, data: bytes) -> None:
        """Anything, over the connection that the router takes for this member's."""
        await self._socket.send(data)

    def messages(self) -> tuple[ToRouter, ...]:
        """What an instance says of itself."""
        alone = Layout(epoch=0, members=(whole(self.number),))
        return hello(self.number, self._url), status(self.number, alone, NO_LOAD, {})

    async def _report(self) -> None:
        while True:
            for message in self.messages():
                await self.send(encode(message))
            await asyncio.sleep(_REPORT_INTERVAL_S)

    async def _receive(self) -> None:
        while True:
            message = decode_to_instance(await self._socket.recv())
            self.received[type(message).__name__] += 1
            if isinstance(message, Prepare):
                epoch = message.transition.epoch
                vote = Vote(call=message.call, epoch=epoch, ok=False, reason="a mock moves nothing")
                await self.send(encode(vote))

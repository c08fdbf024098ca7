"""One connection that waits for an answer which is made for all who ask for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

from starlette.types import Message, Send


class Listener:
    """Sends what was before and then what it is told, in order; it may be told faster than that."""

    def __init__(self, before: Iterator[Message], *, ended: bool) -> None:
        self.left = False
        self._before = before
        self._told: list[Message] = []
        self._ended = ended
        self._changed = asyncio.Event()
        self._changed.set()
        self._idle = asyncio.Event()

    def tell(self, message: Message) -> None:
        if self.left:
            return
        self._told.append(message)
        self._idle.clear()
        self._changed.set()

    def end(self) -> None:
        """Nothing else will be told."""
        self._ended = True
        self._changed.set()

    def leave(self) -> None:
        """Its client is not there any more."""
        self.left = True
        self._idle.set()
        self._changed.set()

    async def listen(self, send: Send) -> None:
        """Until the end of it, or until its client has left."""
        try:
            await self._pass_on(self._before, send)
            while not self.left:
                await self._changed.wait()
                self._changed.clear()
                while self._told and not self.left:
                    told, self._told = self._told, []
                    await self._pass_on(told, send)
                if self._ended:
                    return
                self._idle.set()
        finally:
            self._idle.set()

    async def taken(self) -> None:
        """Until it has sent what it was told, or its client has left."""
        await self._idle.wait()

    async def _pass_on(self, messages: Iterable[Message], send: Send) -> None:
        for message in messages:
            if self.left:
                return
            await send(message)

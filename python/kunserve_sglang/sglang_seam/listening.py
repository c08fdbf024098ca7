"""One connection that waits for an answer which is made for all who ask for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from starlette.types import Message, Send


class Listener:
    """Sends what it is told, in order; it may be told faster than it sends."""

    def __init__(self, told: Iterable[Message], *, ended: bool) -> None:
        self.left = False
        self._told = list(told)
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
            while not self.left:
                await self._changed.wait()
                self._changed.clear()
                while self._told and not self.left:
                    told, self._told = self._told, []
                    for message in told:
                        await send(message)
                if self._ended:
                    return
                self._idle.set()
        finally:
            self._idle.set()

    async def taken(self) -> None:
        """Until it has sent what it was told, or its client has left."""
        await self._idle.wait()

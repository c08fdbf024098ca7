"""Clients that ask one thing after the other, as many at once as the hour of the day has."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from benchmark.faults.load import Ask, Clients
from benchmark.faults.verdicts import OK, verdict

MOST = 40
_FEWEST = 2
_LASTS_S = (4.0, 15.0)
_LOOK_S = 0.1
_KEPT_ERRORS = 20


@dataclass(slots=True)
class Crowd:
    """`verdicts` of all requests that have ended, and what was wrong with the first few.

    Each request is one of `asked`, whose answers are known.
    """

    clients: Clients
    asked: Sequence[Ask]
    wanted: Sequence[Sequence[object]]
    chance: random.Random
    again: int
    size: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Inside the block; then the requests under way come to their ends."""
        tasks = [asyncio.create_task(self._ask_on(number)) for number in range(MOST)]
        changing = asyncio.create_task(self._change())
        try:
            yield
        finally:
            changing.cancel()
            self.size = -1
            await asyncio.gather(changing, *tasks, return_exceptions=True)
        for task in tasks:
            task.result()

    async def _change(self) -> None:
        """Few at most times, many now and then."""
        while True:
            self.size = round(_FEWEST * (MOST / _FEWEST) ** self.chance.random())
            await asyncio.sleep(self.chance.uniform(*_LASTS_S))

    async def _ask_on(self, number: int) -> None:
        while self.size >= 0:
            if number >= self.size:
                await asyncio.sleep(_LOOK_S)
                continue
            which = self.chance.randrange(len(self.asked))
            (sent,) = self.clients.send([self.asked[which]], again=self.again)
            await sent.task
            found = verdict(sent.answer, self.wanted[which])
            self.verdicts[found] += 1
            if found != OK and len(self.errors) < _KEPT_ERRORS:
                self.errors.append(f"{found}: request {which}: {sent.answer.error}")

"""What calls have begun and is carried through when whoever asked for it has gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Background:
    """Tasks that end by themselves, or with the router."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def begin(
        self, work: Coroutine[Any, Any, T], title: str, *, wait: bool
    ) -> asyncio.Task[T]:
        """Start `work` and wait for its end; without `wait`, only until it may have been refused.

        Raises what ends `work` until then; later, the log gets it, as `title`.
        """
        task = asyncio.create_task(work, name=title)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        await (asyncio.shield(task) if wait else asyncio.sleep(0))
        if task.done():
            task.result()
        return task

    async def close(self) -> None:
        """Cancel what is still under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("%s: %s", task.get_name(), error)

"""What a command gets: the router, where to write, and in which form."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from rich.console import Console, RenderableType

from kunserve_sglang.api.client import Answer, RouterClient
from kunserve_sglang.api.errors import Unreachable

_WIDTH_OF_A_FILE = 160
"""Columns of a table that is not for a terminal; rich would take 80 and cut."""

T = TypeVar("T")


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """Left to the caller, who ends as quietly for JSON as for tables; rich would exit here."""
        raise BrokenPipeError


class Session:
    """One run of the command line."""

    def __init__(self, client: RouterClient, *, raw: bool) -> None:
        self.client = client
        self.raw = raw
        known = sys.stdout.isatty() or "COLUMNS" in os.environ
        self.console = _Console(
            highlight=False, markup=False, width=None if known else _WIDTH_OF_A_FILE
        )

    def show(self, answer: Answer, kind: type[T], view: Callable[[T], RenderableType]) -> T:
        """Write an answer, as it came or as a view; returns what it says."""
        value = answer.read(kind)
        if self.raw:
            self.write(answer.body)
        else:
            self.console.print(view(value))
        return value

    def write(self, line: bytes) -> None:
        """One line of JSON."""
        sys.stdout.buffer.write(line.rstrip() + b"\n")
        sys.stdout.buffer.flush()

    def warn(self, text: str) -> None:
        Console(stderr=True, highlight=False, markup=False).print(
            f"kunserve: {' '.join(text.split())}", style="red", soft_wrap=True
        )

    def poll(
        self, call: Callable[[], Answer], interval_s: float, count: int | None
    ) -> Iterator[Answer | Unreachable]:
        """Answers every `interval_s` seconds, `count` times or for good.

        Raises what the first call raises; later the router may be away for a while (it is being
        restarted, say), which is yielded in place of an answer.
        """
        done = 0
        while True:
            try:
                yield call()
            except Unreachable as error:
                if not done:
                    raise
                yield error
            done += 1
            if done == count:
                return
            time.sleep(interval_s)

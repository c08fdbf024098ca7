"""What the launcher shows: a spinner on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.status import Status


class Step:
    """A running step whose detail can change."""

    def __init__(self, title: str, status: Status | None) -> None:
        self._title = title
        self._status = status

    def update(self, detail: str) -> None:
        if self._status is not None:
            self._status.update(f"{self._title}: {detail}")


class Console:
    def __init__(self) -> None:
        self._rich = RichConsole(stderr=True, highlight=False)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show that something takes its time, and how long it took."""
        started = time.monotonic()
        if self._rich.is_terminal:
            with self._rich.status(title) as status:
                yield Step(title, status)
        else:
            yield Step(title, None)
        self._rich.print(f"kunserve: {title}: {time.monotonic() - started:.1f} s", style="dim")

    def note(self, text: str) -> None:
        self._rich.print(f"kunserve: {text}", style="dim")

    def error(self, text: str) -> None:
        self._rich.print(f"kunserve: {text}", style="red")

    def ready(self, text: str) -> None:
        """The one line on stdout that says the cluster is ready; scripts wait for it."""
        print(text, flush=True)
        sys.stdout.flush()

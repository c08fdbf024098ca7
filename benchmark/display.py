"""What a terminal shows while a run is under way."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmark import client
from benchmark.workload import Workload


class RunDisplay:
    """One progress bar: answers of a run, and how many requests queue or stream meanwhile."""

    def __init__(self, name: str, workload: Workload, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description:9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            refresh_per_second=2,  # the cores belong to the cluster
        )
        self._task = self._bars.add_task(name, total=len(workload.requests), state="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bars.update(self._task, state="stopped" if kind else "done")
        self._bars.stop()

    def starting(self, waited_s: float) -> None:
        self._bars.update(self._task, state=f"starting the cluster ({waited_s:.0f} s)")

    def started(self) -> None:
        self._bars.update(self._task, state="warming up")

    def progress(self, so_far: client.Progress) -> None:
        answered = so_far.completed + so_far.failed
        state = f"{so_far.queued} queued, {so_far.streaming} streaming"
        if so_far.failed:
            state += f", {so_far.failed} failed"
        if answered == so_far.total:
            state = "waiting for the cluster to restore"
        self._bars.update(self._task, completed=answered, state=state)

"""Commands that go on until Ctrl-C: `watch`, and `events --follow`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

import msgspec
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from kunserve_sglang.api.client import Answer
from kunserve_sglang.api.errors import Unreachable
from kunserve_sglang.api.events import Event
from kunserve_sglang.api.types import ClusterStatus, Events
from kunserve_sglang.cli.session import Session
from kunserve_sglang.cli.views import cluster_view, event_line


def watch(session: Session, interval_s: float, count: int | None) -> None:
    """Show the cluster over and over: in place on a terminal, one after the other elsewhere."""
    shown: RenderableType = Text("")
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        draw = _canvas(session, stack)
        for answer in session.poll(lambda: session.client.call("status"), interval_s, count):
            if isinstance(answer, Unreachable):
                if session.raw:
                    session.warn(str(answer))
                else:
                    draw(Group(shown, Text(f"{answer}; trying again", "red")))
            elif session.raw:
                session.write(answer.body)
            else:
                shown = cluster_view(answer.read(ClusterStatus))
                draw(shown)


def _canvas(session: Session, stack: ExitStack) -> Callable[[RenderableType], None]:
    if session.raw or not session.console.is_terminal:
        return session.console.print
    live = stack.enter_context(Live(console=session.console, auto_refresh=False))
    return lambda frame: live.update(frame, refresh=True)


def follow(session: Session, limit: int | None, interval_s: float, count: int | None) -> None:
    """Write every event once: the last `limit` of those that are there, then new ones."""
    seen: set[tuple[int, float]] = set()
    newest = slice(None) if limit is None else slice(-limit, None)
    away = False
    with suppress(KeyboardInterrupt):
        for answer in session.poll(lambda: session.client.call("events"), interval_s, count):
            if isinstance(answer, Unreachable):
                if not away:
                    session.warn(f"{answer}; trying again")
                away = True
                continue
            _write_events(session, _unseen(answer, seen)[newest])
            newest, away = slice(None), False


def _write_events(session: Session, events: Iterable[Event]) -> None:
    for event in events:
        if session.raw:
            session.write(msgspec.json.encode(event))
        else:
            session.console.print(event_line(event), soft_wrap=True)


def _unseen(answer: Answer, seen: set[tuple[int, float]]) -> list[Event]:
    """Epochs begin anew with the cluster, so they alone do not say which event it is."""
    new = [e for e in answer.read(Events).events if (e.epoch, e.time) not in seen]
    seen.update((e.epoch, e.time) for e in new)
    return new

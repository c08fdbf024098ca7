"""An instance without a model: a mock worker, and a scripted control link."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import zmq

from kunserve_sglang.core.identity import ModelIdentity
from kunserve_sglang.core.keys import MemberKeys
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.core.load import Load, Slots
from kunserve_sglang.core.messages import (
    Abort,
    Attainable,
    Commit,
    Done,
    Hello,
    Leave,
    Lost,
    Prepare,
    Span,
    Status,
    ToRouter,
    Trace,
    Traced,
    TransitionStats,
    Vote,
    Welcome,
)
from kunserve_sglang.instance.parts.cache_log import CacheLog
from kunserve_sglang.instance.parts.control import ControlLink
from kunserve_sglang.testing.mock_member import (
    LAYERS,
    NO_LOAD,
    hello,
    status,
    whole,
)
from tests.support.background import Background
from tests.support.mock_worker import MockWorker

MODEL = ModelIdentity(
    name="tiny",
    architecture="LlamaForCausalLM",
    layers=LAYERS,
    dtype="float32",
    context=2048,
    requests=0,
    config="c",
    weights="w",
    versions={"sglang": "1", "kunserve-sglang": "2"},
)

_PATIENCE_S = 20.0
"""What a test holds back it lets go again within this time."""


def vote_yes(message: Prepare) -> Vote:
    return Vote(call=message.call, epoch=message.transition.epoch, ok=True)


def vote_no(message: Prepare, reason: str = "not now") -> Vote:
    return Vote(call=message.call, epoch=message.transition.epoch, ok=False, reason=reason)


class MockInstance:
    """A worker with a control link: says hello, reports, and takes part in transitions.

    `on_prepare` is asked for the vote; None means that it never comes. `on_commit` says whether a
    decision arrives at all.
    """

    def __init__(
        self,
        number: int,
        control_address: str,
        background: Background,
        *,
        reporting: bool = True,
        keys: MemberKeys | None = None,
        url: str = "",
    ) -> None:
        """With a `url`, another server takes the place of the worker's."""
        self.number = number
        self._url = url
        self.worker = MockWorker(background)
        self.on_prepare: Callable[[Prepare], Vote | None] = vote_yes
        self.load = NO_LOAD
        self.reporting = reporting
        self.obeyed: Counter[str] = Counter()
        self.cached: set[int] = set()
        self._cache_log = CacheLog(number)
        self._whole = whole(number)
        self.layout = Layout(epoch=0, members=(self._whole,))
        self.lost: list[Lost] = []
        self.on_commit: Callable[[Commit], bool] = lambda _: True
        self.heeds_losses = True
        self._address = control_address
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._follows = False
        self._keys = keys
        self._offered: Layout | None = None
        self._preparing = False
        self._stopping = threading.Event()
        self._greet = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def greet(self) -> None:
        """Say hello now."""
        self._greet.set()

    def set_load(self, demand: int, *, used: int = 0, running: int = 0, waiting: int = 0) -> None:
        slots = Slots(used=used, cached=0, capacity=self._capacity())
        self.load = Load(slots=slots, running=running, waiting=waiting, demand=demand)

    @contextmanager
    def holding_votes(self) -> Iterator[None]:
        """Votes yes only once the block is left: a transition begun inside it is still running."""
        go_on = threading.Event()

        def hold(message: Prepare) -> Vote:
            assert go_on.wait(_PATIENCE_S)
            return vote_yes(message)

        self.on_prepare = hold
        try:
            yield
        finally:
            go_on.set()
            self.on_prepare = vote_yes

    def cache(self, blocks: Sequence[int]) -> None:
        """From now on these blocks are cached, and no others."""
        self._calls.put(lambda: self._cache(set(blocks)))

    def stop(self) -> None:
        self.hang_up()
        self.worker.stop()

    def hang_up(self) -> None:
        """End the control connection, and nothing else."""
        self._stopping.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _capacity(self) -> int:
        return self.layout.member(self.number).capacity

    def _hello(self) -> Hello:
        return hello(self.number, self._url or self.worker.url)

    def _status(self) -> Status:
        return status(self.number, self.layout, self.load, {"micro_batches_own": 3})

    def _serve(self) -> None:
        context = zmq.Context()
        link = ControlLink(context, self._address, self._hello(), self._keys)
        next_status = 0.0
        while not self._stopping.is_set():
            if self._greet.is_set():
                self._greet.clear()
                link.send(self._hello())
            message = link.receive(0.01)
            if message is not None:
                self.obeyed[type(message).__name__] += 1
                answer = self._obey(message)
                if self.reporting:
                    link.send(self._status())  # as members do, before they say that it is done
                if answer is not None:
                    link.send(answer)
                next_status = 0.0
            while not self._calls.empty():
                self._calls.get()()
            if self._follows and (report := self._cache_log.report()) is not None:
                link.send(report)
            if self.reporting and time.monotonic() >= next_status:
                next_status = time.monotonic() + 0.05
                link.send(self._status())
        link.close()
        context.term()

    def _cache(self, blocks: set[int]) -> None:
        self._cache_log.store(blocks - self.cached)
        self._cache_log.remove(self.cached - blocks)
        self.cached = blocks

    def _obey(self, message: Any) -> ToRouter | None:
        if isinstance(message, Welcome):
            self._follows = True
            self._cache_log.begin(self.cached)
            return None
        if isinstance(message, Attainable):
            return None
        if isinstance(message, Prepare):
            after = message.transition.after
            self._offered = next(g for g in after if self.number in g.ids)
            self._preparing = bool(message.transition.ahead) or message.transition.grows
            return self.on_prepare(message)
        if isinstance(message, Lost):
            self.lost.append(message)
            if self.heeds_losses:
                self.layout = Layout(epoch=message.epoch, members=(self._whole,))
                self.set_load(0)
            return None
        if isinstance(message, Leave):
            self.reporting = False
            return None
        if isinstance(message, Trace):
            spans = () if message.record else (Span("step", 10.0 + self.number, 0.5, {"n": 1}),)
            return Traced(call=message.call, spans=spans)
        if isinstance(message, Abort):
            self._offered = None
            return Done(call=message.call, epoch=message.epoch, ok=True)
        assert isinstance(message, Commit)
        if not self.on_commit(message):
            return None
        if message.epoch == self.layout.epoch:  # said again: the answer may have got lost
            return Done(call=message.call, epoch=message.epoch, ok=True)
        assert self._offered is not None
        self.layout, self._offered = self._offered, None
        self.set_load(self.load.demand, running=self.load.running, waiting=self.load.waiting)
        stats = TransitionStats(freed_bytes=1000, sent_kv_bytes=10, remap_ms=2.0, stall_ms=5.0)
        if self._preparing:
            stats = TransitionStats()
        return Done(call=message.call, epoch=message.epoch, ok=True, stats=stats)

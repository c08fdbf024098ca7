"""Instances without a model that serve as SGLang does: one batch at a time, in order of arrival.

What a step takes is said by a profile of the simulator. A step is a prefill as long as requests
wait for which there are slots, and one token for each that runs otherwise. The router hears of
their load as it does of real instances'.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kunserve_sglang.core.cost_model import Chunk, Work
from kunserve_sglang.core.layout import LayerRange, Layout, Member
from kunserve_sglang.core.load import Load, Pages, Slots
from kunserve_sglang.core.messages import PROTOCOL_VERSION, Hello, Mode, Status
from kunserve_sglang.simulation.cluster_profile import Profile

_REPORT_S = 0.05
"""As instances do: after a step, and not more often than this."""


@dataclass(eq=False)
class BatchJob:
    """One request: its lengths, and the number of each token as it is made."""

    prompt: int
    output: int
    made: int = 0
    tokens: asyncio.Queue[int] = field(default_factory=asyncio.Queue)

    @property
    def slots(self) -> int:
        """In the end."""
        return self.prompt + self.output

    @property
    def used(self) -> int:
        return self.prompt + self.made


class BatchingInstance:
    """One instance, with the costs and the slots of `profile`; `produced` counts its tokens."""

    def __init__(self, number: int, profile: Profile, report: Callable[[Status], None]) -> None:
        self.number = number
        self.produced = 0
        self._profile = profile
        self._tell = report
        self._memory = profile.memory(owners=1)
        layers = LayerRange(0, profile.layers)
        self.capacity = self._memory.capacity(layers, 1)
        member = Member(instance=number, layers=layers, capacity=self.capacity, address="none")
        self._layout = Layout(epoch=0, members=(member,))
        self._waiting: deque[BatchJob] = deque()
        self._running: list[BatchJob] = []
        self._work = asyncio.Event()

    def hello(self) -> Hello:
        """What it says of itself first."""
        return Hello(
            version=PROTOCOL_VERSION,
            instance=self.number,
            url=f"http://127.0.0.1:{self.number + 1}",
            data_address="none",
            scheduler="modelled",
            layer_count=self._profile.layers,
            memory=self._memory,
            capacity=self.capacity,
            costs=self._profile.cost,
        )

    def submit(self, prompt: int, output: int) -> BatchJob:
        job = BatchJob(prompt, output)
        self._waiting.append(job)
        self._work.set()
        return job

    async def run(self) -> None:
        """One step after the other, until cancelled."""
        now = asyncio.get_running_loop().time
        reported = 0.0
        while True:
            if not self._waiting and not self._running:
                self._work.clear()
                self._report()
                await self._work.wait()
            began = self._admit()
            batch = began or list(self._running)
            await asyncio.sleep(self._step_s(began))
            for job in batch:
                job.made += 1
                self.produced += 1
                job.tokens.put_nowait(job.made)
                if job.made >= job.output:
                    self._running.remove(job)
            if now() >= reported + _REPORT_S:
                reported = now()
                self._report()

    def _admit(self) -> list[BatchJob]:
        """In order, as many as have slots and go into one batch of prompts."""
        began: list[BatchJob] = []
        free = self.capacity - sum(job.slots for job in self._running)
        tokens = self._profile.chunked_prefill_size
        while self._waiting:
            job = self._waiting[0]
            if job.slots > free or job.prompt > tokens:
                break
            free, tokens = free - job.slots, tokens - job.prompt
            began.append(self._waiting.popleft())
        self._running += began
        return began

    def _step_s(self, began: list[BatchJob]) -> float:
        profile = self._profile
        if began:
            work = Work(chunks=tuple(Chunk(0, job.prompt) for job in began))
            requests = len(began)
        else:
            requests = len(self._running)
            work = Work(decodes=requests, context=sum(job.used for job in self._running))
        ms = profile.layers * profile.cost.predict(work)
        return (ms + profile.step.fixed_ms + requests * profile.step.request_ms) / 1e3

    def _report(self) -> None:
        used = sum(job.used for job in self._running)
        jobs = [*self._running, *self._waiting]
        load = Load(
            slots=Slots(used=used, cached=0, capacity=self.capacity),
            running=len(self._running),
            waiting=len(self._waiting),
            demand=sum(job.slots for job in jobs),
            prompts=sum(job.prompt for job in self._waiting),
            produced=sum(job.made for job in self._running),
        )
        total, parameters = self._memory.pages, sum(self._memory.layer_pages)
        pages = Pages(parameters=parameters, kv=total - parameters, free=0, total=total)
        self._tell(
            Status(
                instance=self.number,
                epoch=0,
                mode=Mode.INDEPENDENT,
                layout=self._layout,
                pages=pages,
                load=load,
            )
        )

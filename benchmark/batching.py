"""Instances without a model that serve as SGLang does: one batch at a time, in order of arrival.

What a step takes is said by a profile of the simulator. A step is a prefill as long as requests
wait for which there are slots, and one token for each that runs otherwise. The router hears of
their load as it does of real instances'.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio
from aiohttp import web

from kunserve_sglang.core.cost_model import Chunk, Work
from kunserve_sglang.core.layout import LayerRange, Layout, Member
from kunserve_sglang.core.load import Load, Pages, Slots
from kunserve_sglang.core.messages import (
    PROTOCOL_VERSION,
    Hello,
    Mode,
    Status,
    connection_name,
    encode,
)
from kunserve_sglang.simulation.cluster_profile import Profile

_REPORT_S = 0.05
"""As instances do: after a step, and not more often than this."""

_GREET_S = 0.5


class _Sampling(msgspec.Struct):
    max_new_tokens: int


class _Asked(msgspec.Struct):
    input_ids: list[int]
    sampling_params: _Sampling
    stream: bool = False


@dataclass(eq=False)
class _Job:
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
    """One instance, with the costs and the slots of `profile`. `produced` counts all tokens."""

    def __init__(self, number: int, profile: Profile) -> None:
        self.number = number
        self.produced = 0
        self._profile = profile
        self._memory = profile.memory(owners=1)
        layers = LayerRange(0, profile.layers)
        self.capacity = self._memory.capacity(layers, 1)
        member = Member(instance=number, layers=layers, capacity=self.capacity, address="none")
        self._layout = Layout(epoch=0, members=(member,))
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._work = asyncio.Event()
        self._context = zmq.asyncio.Context()

    async def start(self, control_address: str) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/health", self._healthy)
        app.router.add_post("/generate", self._generate)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self._url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, connection_name(self.number))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(control_address)
        self._tasks = [asyncio.create_task(t) for t in (self._steps(), self._greet())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._runner.cleanup()
        self._socket.close()
        self._context.term()

    # --- requests -------------------------------------------------------------------------------

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        asked = msgspec.json.decode(await request.read(), type=_Asked)
        job = _Job(len(asked.input_ids), asked.sampling_params.max_new_tokens)
        self._waiting.append(job)
        self._work.set()
        try:
            if asked.stream:
                return await self._stream(request, job)
            while await job.tokens.get() < job.output:
                pass
            return web.json_response({"text": "", "meta_info": {"completion_tokens": job.output}})
        finally:
            if job in self._waiting:
                self._waiting.remove(job)
            if job in self._running:
                self._running.remove(job)

    async def _stream(self, request: web.Request, job: _Job) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        made = 0
        while made < job.output:
            made = await job.tokens.get()
            await response.write(b'data: {"text": " token"}\n\n')
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    # --- steps ----------------------------------------------------------------------------------

    async def _steps(self) -> None:
        reported = 0.0
        due = time.perf_counter()
        while True:
            if not self._waiting and not self._running:
                self._work.clear()
                await self._report()
                await self._work.wait()
            began = self._admit()
            batch = began or self._running
            # A step that was late does not make the next one late as well.
            due = max(due, time.perf_counter() - 0.001) + self._step_s(began)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            for job in list(batch):
                job.made += 1
                self.produced += 1
                job.tokens.put_nowait(job.made)
                if job.made >= job.output and job in self._running:
                    self._running.remove(job)
            if time.perf_counter() >= reported + _REPORT_S:
                reported = time.perf_counter()
                await self._report()

    def _admit(self) -> list[_Job]:
        """In order, as many as have slots and go into one batch of prompts."""
        began: list[_Job] = []
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

    def _step_s(self, began: list[_Job]) -> float:
        profile = self._profile
        if began:
            work = Work(chunks=tuple(Chunk(0, job.prompt) for job in began))
            requests = len(began)
        else:
            requests = len(self._running)
            work = Work(decodes=requests, context=sum(job.used for job in self._running))
        step = profile.step
        ms = profile.layers * profile.cost.predict(work)
        return (ms + step.fixed_ms + requests * step.request_ms) / 1e3

    # --- reports --------------------------------------------------------------------------------

    async def _greet(self) -> None:
        while True:
            hello = Hello(
                version=PROTOCOL_VERSION,
                instance=self.number,
                url=self._url,
                data_address="none",
                scheduler="mock",
                layer_count=self._profile.layers,
                memory=self._memory,
                capacity=self.capacity,
                costs=self._profile.cost,
            )
            await self._socket.send(encode(hello))
            await self._report()
            await asyncio.sleep(_GREET_S)

    async def _report(self) -> None:
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
        total = self._memory.pages
        parameters = sum(self._memory.layer_pages)
        status = Status(
            instance=self.number,
            epoch=0,
            mode=Mode.INDEPENDENT,
            layout=self._layout,
            pages=Pages(parameters=parameters, kv=total - parameters, free=0, total=total),
            load=load,
        )
        await self._socket.send(encode(status))

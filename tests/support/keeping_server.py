"""The HTTP side of an instance without a model that keeps answers, on SGLang's web server."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from kunserve_sglang.core.addresses import listen_at
from kunserve_sglang.sglang_seam.kept_answers import keep_answers
from tests.support.background import Background
from tests.support.waiting import until


class KeepingServer:
    """Answers are told to say what they have been asked, step by step.

    `runs` counts requests that were computed, by what they say; `steps` how far each of them is.
    `left` are those that were given up.
    """

    def __init__(self, background: Background, key: str) -> None:
        self.runs: Counter[str] = Counter()
        self.steps: Counter[str] = Counter()
        self.left: list[str] = []
        self._background = background
        self._allowed: Counter[str] = Counter()
        self._moved = asyncio.Event()
        app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/generate", self._generate, methods=["POST"]),
            ]
        )
        keep_answers(app, key)
        listener = listen_at("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(app, log_config=None, lifespan="off")
        self._server = uvicorn.Server(config)
        self._serving = asyncio.run_coroutine_threadsafe(
            self._server.serve([listener]), background.loop
        )
        until(lambda: self._server.started)

    def go(self, text: str, steps: int = 1) -> None:
        """Let the answer to `text` come so many steps further; its fourth is the last."""

        def allow() -> None:
            self._allowed[text] += steps
            self._moved.set()
            self._moved = asyncio.Event()

        self._background.loop.call_soon_threadsafe(allow)

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._serving.result(30)

    async def _health(self, _: Request) -> Response:
        return Response()

    async def _generate(self, request: Request) -> Response:
        asked = await request.json()
        text = asked["text"]
        self.runs[text] += 1
        if asked.get("stream"):
            return StreamingResponse(self._events(text), media_type="text/event-stream")
        async for _ in self._made(text):
            # As SGLang does: between two tokens it looks whether somebody is there.
            if await request.is_disconnected():
                self.left.append(text)
                return Response(status_code=400)
        return JSONResponse({"text": text * 3})

    async def _events(self, text: str) -> AsyncIterator[bytes]:
        try:
            async for step in self._made(text):
                yield event(text, step)
            yield DONE
        except asyncio.CancelledError:
            self.left.append(text)
            raise

    async def _made(self, text: str) -> AsyncIterator[int]:
        for step in range(1, 4):
            while self._allowed[text] < step:
                await self._moved.wait()
            self.steps[text] += 1
            yield step
        while self._allowed[text] < 4:
            await self._moved.wait()


DONE = b"data: [DONE]\n\n"


def event(text: str, step: int) -> bytes:
    return b"data: %b\n\n" % json.dumps({"text": text * step}).encode()


def whole_stream(text: str) -> bytes:
    return b"".join(event(text, step) for step in range(1, 4)) + DONE


def whole_answer(text: str) -> Any:
    return {"text": text * 3}

"""SGLang's side of a client in the scheduler's own process: endpoints, tokenizer, detokenizer.

All of it is SGLang's code, and everything passes through its wire format; only HTTP and the sockets
between its processes are left out. Nothing happens but in `settle`, so that a call means the same
every time it is made.
"""

from __future__ import annotations

import asyncio
import json
import pickle
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fastapi import HTTPException
from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.io_struct import (
    BatchStrOutput,
    BatchTokenizedGenerateReqInput,
    GenerateReqInput,
    TokenizedGenerateReqInput,
    sock_recv,
    sock_send,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.parser.template_manager import TemplateManager
from sglang.srt.server_args import ServerArgs
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from kunserve_sglang.sglang_seam.resuming import JournaledGeneration
from tests.support.any_run import by_choice, of_any_run
from tests.support.asking_router import ask_as_router
from tests.support.script import Journaled

Chunks = dict[int, list[Any]]
"""What a client has received, by the number of the choice; -1 is what belongs to none."""

_CALL: ContextVar[str] = ContextVar("call")


class _Tokenizer(TokenizerManager):  # type: ignore[misc]
    def __init__(self, arguments: ServerArgs, dispatch: Callable[[Any], None]) -> None:
        self._dispatch_to_scheduler = dispatch
        super().__init__(arguments, None)

    def init_ipc_channels(self, *_: Any) -> None:
        self.load_snapshot_reader = None

    def auto_create_handle_loop(self) -> None:
        """Outputs are handed in; nothing is to wait for them."""


class _Detokenizer(DetokenizerManager):  # type: ignore[misc]
    def init_ipc_channels(self, port_args: Any, server_args: Any) -> None:
        """Outputs are handed in and taken out."""


class _Wire:
    """A socket as SGLang uses them: it may send objects, or what it has made bytes of."""

    def __init__(self, data: bytes = b"") -> None:
        self._data = data

    @classmethod
    def sent(cls, value: Any) -> bytes:
        wire = cls()
        sock_send(wire, value)
        return wire._data

    @classmethod
    def received(cls, data: bytes) -> Any:
        return sock_recv(cls(data))

    @classmethod
    def passed(cls, value: Any) -> Any:
        """As it is on the other side."""
        return cls.received(cls.sent(value))

    def send_pyobj(self, value: Any, *, protocol: int, **_: Any) -> None:
        self._data = pickle.dumps(value, protocol)

    def recv_pyobj(self, **_: Any) -> Any:
        return pickle.loads(self._data)

    def send(self, data: bytes, **_: Any) -> None:
        self._data = data

    def recv(self, **_: Any) -> bytes:
        return self._data


class _Connection:
    """What SGLang asks of a client's connection."""

    headers: Mapping[str, str] = MappingProxyType({})

    async def is_disconnected(self) -> bool:
        return False


@dataclass
class _UnderWay:
    task: asyncio.Task[None]
    chunks: Chunks
    rids: set[str] = field(default_factory=set)


class Frontend:
    """Calls of clients; `dispatch` is given what SGLang would send to the scheduler."""

    def __init__(self, arguments: ServerArgs, dispatch: Callable[[Any], None]) -> None:
        self._loop = asyncio.SelectorEventLoop()
        self._dispatch = dispatch
        self._arrived: list[bytes] = []
        self._calls: dict[str, _UnderWay] = {}
        self._tokenizer = _Tokenizer(arguments, self._send)
        self._detokenizer = _Detokenizer(arguments, None)
        templates = TemplateManager()
        templates.initialize_templates(self._tokenizer, arguments.model_path)
        self._chat = OpenAIServingChat(self._tokenizer, templates)
        self._completion = OpenAIServingCompletion(self._tokenizer, templates)
        self._tokenizer.generate_request = JournaledGeneration(
            self._tokenizer, self._tokenizer.generate_request
        )

    @property
    def open(self) -> bool:
        """Whether a client waits for more."""
        return any(not call.task.done() for call in self._calls.values())

    def call(
        self,
        name: str,
        endpoint: str,
        body: dict[str, Any],
        journaled: Journaled | None = None,
    ) -> None:
        """A client calls; `name` is for `leave` and `take_answers`."""
        chunks: Chunks = defaultdict(list)
        _CALL.set(name)
        if journaled is None:
            task = self._loop.create_task(self._answer(endpoint, body, chunks))
        else:
            task = self._loop.create_task(self._stream(endpoint, body, journaled, chunks[-1]))
        self._calls[name] = _UnderWay(task, chunks)
        self.settle()

    def knows(self, name: str) -> bool:
        return name in self._calls

    def leave(self, name: str) -> None:
        """The client is gone, which SGLang is told by its web server."""
        call = self._calls[name]
        call.task.cancel()
        self.settle()
        for rid in sorted(call.rids):
            self._tokenizer.abort_request(rid)

    def arrives(self, output: Any, *_: Any) -> None:
        """The scheduler has sent this; it is as it was at that time, whatever changes later."""
        self._arrived.append(_Wire.sent(output))

    def settle(self) -> None:
        """Let clients have what has been sent, until all of them wait."""
        arrived, self._arrived = self._arrived, []
        for data in arrived:
            output = _Wire.received(data)
            if hasattr(output, "decode_ids"):
                output = _Wire.passed(self._detokenizer._request_dispatcher(output))
            if isinstance(output, BatchStrOutput):
                self._loop.run_until_complete(self._tokenizer._handle_batch_output(output))
            else:
                self._tokenizer._result_dispatcher(output)
            self._turn()
        self._turn()

    def take_answers(self) -> dict[str, tuple[Chunks, bool]]:
        """What each call has received, and whether its client left; they are forgotten."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.task.cancelled():
                call.task.result()
        return {name: (dict(c.chunks), c.task.cancelled()) for name, c in calls.items()}

    def _turn(self) -> None:
        """Until no callback is ready; timers of SGLang's are left to run out."""
        ready: Any = self._loop
        while True:
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()
            if not ready._ready:
                return

    def _send(self, message: Any) -> None:
        message = _Wire.passed(message)
        for request in (
            message if isinstance(message, BatchTokenizedGenerateReqInput) else [message]
        ):
            if isinstance(request, TokenizedGenerateReqInput):
                request.unwrap_pickle_fields()
                self._calls[_CALL.get()].rids.add(request.rid)
        self._dispatch(message)

    async def _answer(self, endpoint: str, body: dict[str, Any], chunks: Chunks) -> None:
        pieces = self._generated if endpoint == "generate" else self._completed
        try:
            async for piece in pieces(endpoint, body):
                for choice, chunk in by_choice(piece):
                    chunks[choice].append(of_any_run(chunk))
        except (ValueError, HTTPException) as error:  # as SGLang's web server tells it
            chunks[-1].append({"error": f"{type(error).__name__}: {error}"})

    async def _stream(
        self, endpoint: str, body: dict[str, Any], journaled: Journaled, sent: list[Any]
    ) -> None:
        """A stream over HTTP; `sent` gets its status, and then its body as it goes out."""

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            given = json.loads((await receive())["body"])
            if endpoint == "generate":
                answer: Any = StreamingResponse(
                    self._generated_events(given), media_type="text/event-stream"
                )
            else:
                answer = await self._handled(endpoint, {"model": "tiny", **given})
            await answer(scope, receive, send)

        path = "/generate" if endpoint == "generate" else f"/v1/{endpoint}"
        await ask_as_router(serve, path, body, journaled, sent)

    async def _generated_events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """As SGLang's web server sends them."""
        try:
            async for output in self._generated("generate", body):
                yield b"data: %b\n\n" % json.dumps(output).encode()
        except ValueError as error:
            yield b"data: %b\n\n" % json.dumps({"error": {"message": str(error)}}).encode()
        yield b"data: [DONE]\n\n"

    async def _generated(self, _: str, body: dict[str, Any]) -> AsyncIterator[Any]:
        request = GenerateReqInput(**body)
        async for piece in self._tokenizer.generate_request(request, _Connection()):
            yield piece

    async def _completed(self, endpoint: str, body: dict[str, Any]) -> AsyncIterator[Any]:
        answer = await self._handled(endpoint, {"model": "tiny", **body})
        if isinstance(answer, StreamingResponse):
            async for line in answer.body_iterator:
                data = str(line).removeprefix("data: ").strip()
                yield data if data == "[DONE]" else json.loads(data)
        elif isinstance(answer, Response):
            yield json.loads(bytes(answer.body))
        else:
            yield answer.model_dump()

    async def _handled(self, endpoint: str, body: dict[str, Any]) -> Any:
        if endpoint == "messages":
            asked = AnthropicMessagesRequest(**body)
            return await AnthropicServing(self._chat).handle_messages(asked, _Connection())
        if endpoint == "chat":
            request = ChatCompletionRequest(**body)
            return await self._chat.handle_request(request, _Connection())
        request = CompletionRequest(**body)
        return await self._completion.handle_request(request, _Connection())

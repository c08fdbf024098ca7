"""Requests as tokens, as an instance will see them; only to find out who has their prefix cached.

Neither SGLang nor transformers is needed for that: `tokenizers` reads `tokenizer.json`, and jinja2
renders the model's chat template. What cannot be read this way (several prompts at once, templates
given by name) has no known prefix, and is routed by load.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from kunserve_sglang.core.blocks import block_hashes
from kunserve_sglang.core.prompt_format import PromptFormat
from kunserve_sglang.router.proxy.chat_messages import (
    Message,
    Tool,
    ToolChoice,
    as_asked,
    tools_for,
)
from kunserve_sglang.router.proxy.chat_template import ChatTemplate
from kunserve_sglang.router.proxy.prefix_index import Prompt

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BYTES_PER_TOKEN = 4
_MAX_WAITING = 64
_MAX_WAITING_BYTES = 2 << 20
"""More than these do not wait to be tokenized, which takes a second for so many bytes: requests
that come then go by load, and so do larger ones."""

_LARGEST_BODY = 1 << 20


class _Unreadable(Exception):
    """The instance may well understand this request; we do not."""


class _Body(msgspec.Struct):
    """What decides about the prompt, in the APIs of SGLang and OpenAI."""

    text: str | None = None
    input_ids: list[int] | None = None
    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    tools: list[Tool] | None = None
    tool_choice: str | ToolChoice | None = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    suffix: Any = None
    lora_path: Any = None
    continue_final_message: bool = False

    @property
    def odd(self) -> bool:
        unread = (self.image_data, self.video_data, self.audio_data, self.suffix, self.lora_path)
        return any((*unread, self.continue_final_message))

    @property
    def namespace(self) -> str | None:
        """SGLang's `extra_key`, under which nothing is shared with other requests."""
        return f"{self.cache_salt or ''}{self.extra_key or ''}" or None


_decoder = msgspec.json.Decoder(_Body)


_UNREADABLE = (
    *(_Unreadable, msgspec.DecodeError),
    *(ValueError, TypeError, OverflowError, RecursionError),  # text and numbers of any kind
)


class PromptReader:
    """Tokenizes requests on a thread of its own, so that no stream has to wait for that."""

    def __init__(self, form: PromptFormat | None = None) -> None:
        """Without a format, only token ids can be read."""
        self._tokenizer = _load(form, _tokenizer, "prompts")
        self._template = _load(form, ChatTemplate, "chats")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._waiting = 0
        self._waiting_bytes = 0

    async def read(self, path: str, body: bytes) -> Prompt:
        """The prompt of a request; never raises for what is in `body`."""
        unknown = Prompt(len(body) // _BYTES_PER_TOKEN)
        reads = self._READS.get(path)
        if reads is None or not self._has_time_for(body):
            return unknown
        self._waiting += 1
        self._waiting_bytes += len(body)
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._read, reads, body)
        except _UNREADABLE:
            return unknown
        finally:
            self._waiting -= 1
            self._waiting_bytes -= len(body)

    def _has_time_for(self, body: bytes) -> bool:
        """Whether neither this request nor those behind it would wait for long."""
        return (
            self._waiting < _MAX_WAITING
            and len(body) <= _LARGEST_BODY
            and self._waiting_bytes + len(body) <= _MAX_WAITING_BYTES
        )

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read(self, reads: Callable[[PromptReader, _Body], list[int]], body: bytes) -> Prompt:
        decoded = _decoder.decode(body)
        if decoded.odd:
            raise _Unreadable
        tokens = array("q", reads(self, decoded))
        return Prompt(len(tokens), block_hashes(tokens, decoded.namespace))

    def _generate(self, body: _Body) -> list[int]:
        return body.input_ids if body.input_ids is not None else self._encode(body.text)

    def _completion(self, body: _Body) -> list[int]:
        prompt = body.prompt
        return prompt if isinstance(prompt, list) else self._encode(prompt)

    def _chat(self, body: _Body) -> list[int]:
        if body.input_ids is not None:
            return body.input_ids
        if self._template is None or not body.messages:
            raise _Unreadable
        more = body.chat_template_kwargs or {}
        if body.reasoning_effort is not None:
            more = {"reasoning_effort": body.reasoning_effort, **more}
        template = self._template
        messages = [m.described(in_parts=template.in_parts) for m in body.messages]
        tools = tools_for(body.tools, body.tool_choice)
        try:
            text = template.render(as_asked(messages), tools, more)
        except Exception as error:
            raise _Unreadable from error
        return self._encode(text, special_tokens=False)

    def _encode(self, text: str | None, *, special_tokens: bool = True) -> list[int]:
        if text is None or self._tokenizer is None:
            raise _Unreadable
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        except Exception as error:
            raise _Unreadable from error
        return ids

    _READS: Mapping[str, Callable[[PromptReader, _Body], list[int]]] = {
        "/generate": _generate,
        "/v1/completions": _completion,
        "/v1/chat/completions": _chat,
    }


def _load(form: PromptFormat | None, load: Callable[[PromptFormat], T], what: str) -> T | None:
    """None, with a line in the log, if the model's files cannot be used."""
    if form is None:
        return None
    try:
        return load(form)
    except Exception as error:  # noqa: BLE001 (tokenizers raises nothing more special)
        logger.warning("%s are routed by load, since their prefix is unknown: %s", what, error)
        return None


def _tokenizer(form: PromptFormat) -> Tokenizer:
    return Tokenizer.from_file(str(Path(form.folder) / "tokenizer.json"))

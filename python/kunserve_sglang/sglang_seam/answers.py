"""Requests that SGLang's HTTP server answers with a 500, or otherwise than the client means.

What a client has got wrong is a 400 with one line that says what; what OpenAI's and Ollama's APIs
allow is served.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from kunserve_sglang.sglang_seam.nulls import NullsAreDefaults, nullless_bodies

_LARGEST_IN_JSON = 2**53 - 1
"""A larger number is not the same in every client; above 2**63 SGLang cannot write it."""

_MEDIA = {"image_data": "pictures", "video_data": "videos", "audio_data": "sound"}
_PARTS = {"image_url": "pictures", "video_url": "videos", "audio_url": "sound"}


def mend_answers(app: Starlette, tokenizer_manager: Any) -> None:
    """Let one server, which has not started to serve, answer as above."""
    tokenizer = tokenizer_manager.tokenizer
    if tokenizer is not None:
        _mend_tokenizer(tokenizer, tokenizer_manager.context_len)
    if not tokenizer_manager.model_config.is_multimodal:
        tokenizer_manager.generate_request = partial(_text_only, tokenizer_manager.generate_request)
    app.add_middleware(NullsAreDefaults, bodies=nullless_bodies(app))
    theirs = app.exception_handlers[RequestValidationError]
    app.add_exception_handler(RequestValidationError, partial(_invalid, theirs))
    app.add_exception_handler(ValueError, _refused)


def _mend_tokenizer(tokenizer: Any, context_len: int) -> None:
    # A tokenizer that does not know its limit says 1e30.
    if tokenizer.model_max_length > _LARGEST_IN_JSON:
        tokenizer.model_max_length = context_len
    # SGLang's Ollama routes want token ids of it, which transformers has come to wrap.
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, return_dict=False)


# --- what the model cannot take ---


def _text_only(generate: Callable[..., Any], obj: Any, request: Any = None) -> Any:
    """In place of `generate_request` where the model takes text: SGLang ignores the rest."""
    _refuse([what for field, what in _MEDIA.items() if _given(getattr(obj, field, None))])
    return generate(obj, request)


def text_only_messages(_serving: Any, request: Any, is_multimodal: bool) -> None:
    """Before SGLang makes a prompt of messages, which drops the parts that are not text."""
    if not is_multimodal:
        contents = (getattr(message, "content", None) for message in request.messages)
        parts = [part for content in contents if isinstance(content, list) for part in content]
        kinds = {getattr(part, "type", None) for part in parts}
        _refuse([what for kind, what in _PARTS.items() if kind in kinds])


def text_only_anthropic(converted: Any, serving: Any, *_: Any, **__: Any) -> None:
    """After SGLang has converted a request of Anthropic's API: what fails later is a 500 there."""
    manager = serving.openai_serving_chat.tokenizer_manager
    text_only_messages(serving, converted, manager.model_config.is_multimodal)


def _refuse(given: list[str]) -> None:
    if given:
        raise ValueError(f"this model takes text only, not {' and '.join(given)}")


def _given(data: Any) -> bool:
    """Whether there is anything in it, in lists of lists as well."""
    if isinstance(data, list):
        return any(map(_given, data))
    return data is not None


# --- Ollama's routes ---


async def ollama_answer(
    handle: Callable[..., Any], serving: Any, request: Any, raw_request: Any
) -> Any:
    """Around SGLang's handlers of these: what is wrong is found before an answer has begun."""
    asked = [request, *getattr(request, "messages", ())]
    if any(getattr(part, "images", None) for part in asked):
        raise ValueError("pictures are not supported here; use /v1/chat/completions")
    answer = await handle(serving, request, raw_request)
    if isinstance(answer, StreamingResponse):
        answer.body_iterator = await _begun(answer.body_iterator)
    return answer


async def _begun(chunks: Any) -> AsyncIterator[Any]:
    """The same chunks, once there is a first one."""
    iterator = aiter(chunks)
    first = await anext(iterator, None)

    async def whole() -> AsyncIterator[Any]:
        if first is not None:
            yield first
        async for chunk in iterator:
            yield chunk

    return whole()


# --- errors ---


async def _invalid(theirs: Callable[..., Any], request: Request, error: Exception) -> Response:
    """A body that does not fit: SGLang's answer, without the path of its source in it."""
    assert isinstance(error, RequestValidationError)
    answer: Response = await theirs(request, _Short(error.errors()))
    return answer


class _Short(RequestValidationError):
    """Says what is wrong in one line, a field each."""

    def __str__(self) -> str:
        return "; ".join(
            f"{'.'.join(str(part) for part in error['loc'][1:]) or 'body'}: {error['msg']}"
            for error in self.errors()
        )


async def _refused(_request: Request, error: Exception) -> Response:
    """SGLang raises these about requests, and lets some of them pass; its own failures are others.

    Those that a schema of an answer raises are bugs of the server, and go on.
    """
    if isinstance(error, ValidationError):
        raise error
    return JSONResponse({"error": {"message": str(error), "code": 400}}, status_code=400)

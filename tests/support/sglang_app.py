"""SGLang's own HTTP application, with as much behind it as a test of its answers needs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from starlette.responses import JSONResponse


class Tokenizer:
    model_max_length = int(1e30)

    def apply_chat_template(self, _messages: Any, *, return_dict: bool = True, **_: Any) -> Any:
        return {"input_ids": [1, 2]} if return_dict else [1, 2]


class TokenizerManager:
    """As much of SGLang's as its routes use here; what it is asked to generate is kept."""

    served_model_name = "m"
    context_len = 8192

    def __init__(self, *, multimodal: bool = False) -> None:
        self.tokenizer = Tokenizer()
        self.model_config = SimpleNamespace(is_multimodal=multimodal)
        self.asked: list[Any] = []
        self.refuses = ""

    def create_abort_task(self, _obj: Any) -> None:
        """Of a stream, when it has ended."""

    async def generate_request(self, obj: Any, _request: Any = None) -> AsyncIterator[Any]:
        self.asked.append(obj)
        if self.refuses:
            raise ValueError(self.refuses)
        yield {"text": "so", "meta_info": {}}
        yield {"text": "so", "meta_info": {"finish_reason": {"type": "stop"}}}


class Serving:
    """In place of a handler of OpenAI's routes: answers with what it has got."""

    async def handle_request(self, request: Any, _raw: Any) -> JSONResponse:
        return JSONResponse(request.model_dump(mode="json", exclude_unset=True))

    create_responses = handle_request

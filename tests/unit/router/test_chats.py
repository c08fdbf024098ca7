"""Chats with tools, calls and parts: the router makes the tokens of them that SGLang makes."""

from __future__ import annotations

import asyncio
import json
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kunserve_sglang.core.blocks import block_hashes
from kunserve_sglang.core.prompt_format import PromptFormat
from kunserve_sglang.router.proxy.chat_template import ChatTemplate
from kunserve_sglang.router.proxy.prefix_index import Prompt
from kunserve_sglang.router.proxy.prompts import PromptReader

TOOLS = """{%- if tools %}tools:{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"""
CALLS = """
{%- if message.tool_calls %}{% for call in message.tool_calls %}
{{- call | tojson }}{{ call.function.name }}({{ call.function.arguments | tojson }})
{%- endfor %}{% endif %}
{%- if message.name %} by {{ message.name }}{% endif %}
{%- if message.tool_call_id %} to {{ message.tool_call_id }}{% endif %}
{%- if message.reasoning_content %} thinks {{ message.reasoning_content }}{% endif %}"""

TEXTS = (
    TOOLS
    + """{%- for message in messages %}[{{ message.role }}]{{ message.content }}"""
    + CALLS
    + """{%- endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
)
"""A template that takes a content for one text."""

PARTS = (
    TOOLS
    + """{%- for message in messages %}[{{ message.role }}]
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}<{{ part.type }}>{{ part.text or part.name }}{% endfor %}
{%- endif %}"""
    + CALLS
    + """{%- endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
)

FLAT = """{% if tools %}{% for tool in tools %}{{ tool.name[0] }}{{ tool.description }}
{%- endfor %}{% endif %}{% for message in messages %}{{ message.content }}{% endfor %}"""
"""It wants functions without what is around them, as Mistral's do."""

WEATHER = {
    "function": {
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "name": "weather",
        "description": "of a town",
        "unknown": 1,
    },
    "type": "function",
}
CLOCK = {"type": "function", "function": {"name": "clock", "strict": True}}
CALL = {
    "function": {"arguments": '{"city" : "Köln", "when": [1, 2.50, null]}', "name": "weather"},
    "id": "call-1",
    "type": "function",
}
USER = {"role": "user", "content": "How is the weather? " * 10}

CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [USER]},
    "tools": {"messages": [USER], "tools": [WEATHER, CLOCK]},
    "no tool may be called": {"messages": [USER], "tools": [WEATHER], "tool_choice": "none"},
    "a tool has to be called": {
        "messages": [USER],
        "tools": [WEATHER, CLOCK],
        "tool_choice": {"type": "function", "function": {"name": "clock"}},
    },
    "a call and its answer": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call-1", "name": "weather", "content": "rain"},
        ],
        "tools": [WEATHER],
    },
    "arguments as an object": {
        "messages": [
            USER,
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "clock", "arguments": {"b": 1, "a": "ü"}}}],
            },
            {
                "role": "tool",
                "content": [{"type": "text", "text": "12"}, {"type": "text", "text": "h"}],
            },
        ]
    },
    "no calls": {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": []}, USER]},
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
                "name": "nobody sees that",
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm"},
                    {"type": "text", "text": "three"},
                ],
                "reasoning_content": "so",
            },
            {"role": "developer", "name": "dev", "content": "now"},
        ]
    },
    "the assistant was last": {"messages": [USER, {"role": "assistant", "content": "It is"}]},
    "a reference to a tool": {
        "messages": [
            USER,
            {"role": "tool", "content": [{"type": "tool_reference", "name": "weather"}]},
        ],
        "tools": [{**WEATHER, "defer_loading": True}],
    },
}


def folder_with(template: str, folder: Path) -> Path:
    """A tokenizer with a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path, chat: dict[str, Any]) -> Prompt:
    async def once() -> Prompt:
        reader = PromptReader(PromptFormat(folder=str(folder)))
        try:
            return await reader.read("/v1/chat/completions", json.dumps(chat).encode())
        finally:
            reader.close()

    return asyncio.run(once())


def sglang_reads(folder: Path, chat: dict[str, Any]) -> list[int]:
    """With SGLang's own endpoint, which needs only a tokenizer for that."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
    from sglang.srt.parser.jinja_template_utils import detect_jinja_template_content_format
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    serving = OpenAIServingChat.__new__(OpenAIServingChat)
    serving.__dict__.update(
        default_chat_template_kwargs=None,
        is_gpt_oss=False,
        is_gemma4=False,
        tool_call_parser=None,
        chat_encoding_spec=None,
        reasoning_parser=None,
        _tokenizer_auto_adds_specials=True,
        tokenizer_manager=SimpleNamespace(
            tokenizer=tokenizer,
            server_args=SimpleNamespace(reasoning_parser=None, served_model_name="m"),
        ),
        template_manager=SimpleNamespace(
            chat_template_name=None,
            jinja_template_content_format=detect_jinja_template_content_format(
                tokenizer.chat_template
            ),
            reasoning_config=None,
            force_reasoning=False,
        ),
    )
    request = ChatCompletionRequest(model="m", **chat)
    ids: list[int] = serving._process_messages(request, is_multimodal=False).prompt_ids
    return ids


@pytest.mark.parametrize("template", [TEXTS, PARTS], ids=["texts", "parts"])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
def test_the_tokens_are_sglangs(tmp_path: Path, chat: dict[str, Any], template: str) -> None:
    folder = folder_with(template, tmp_path)
    ids = sglang_reads(folder, chat)
    assert len(ids) > 20
    assert read(folder, chat) == Prompt(len(ids), block_hashes(array("q", ids)))


def test_functions_without_what_is_around_them(tmp_path: Path) -> None:
    folder = folder_with(FLAT, tmp_path)
    ids = sglang_reads(folder, CHATS["tools"])
    assert read(folder, CHATS["tools"]) == Prompt(len(ids), block_hashes(array("q", ids)))


def test_whether_a_template_goes_through_parts_is_what_sglang_says(tmp_path: Path) -> None:
    from sglang.srt.parser.jinja_template_utils import detect_jinja_template_content_format

    loops = (
        "{% for c in message['content'] %}{% endfor %}",
        "{% for c in message.content[1:] %}{% endfor %}",
        "{% for c in msg.content | list %}{% endfor %}",
        "{% for c in m['content'] %}{% endfor %}",
        "{% for c in message.parts %}{% endfor %}",
        "{% for c in other.content %}{% endfor %}",
        "{{ message.content }}",
        "<vision>",
        *(TEXTS, PARTS, FLAT),
    )
    found = []
    for source in loops:
        form = PromptFormat(folder=str(folder_with(source, tmp_path)))
        found.append("openai" if ChatTemplate(form).in_parts else "string")
    assert found == [detect_jinja_template_content_format(source) for source in loops]


def test_the_same_said_in_another_way_is_the_same_prefix(tmp_path: Path) -> None:
    folder = folder_with(TEXTS, tmp_path)
    other = {
        "tools": [{"type": "function", "function": {**WEATHER["function"], "strict": False}}],  # type: ignore[dict-item]
        "messages": [
            {"content": "Be brief.", "role": "system"},
            {"content": [{"text": USER["content"], "type": "text"}], "role": "user"},
            {
                "tool_calls": [
                    {
                        "id": "call-1",
                        "function": {
                            "name": "weather",
                            "arguments": {"city": "Köln", "when": [1, 2.5, None]},
                        },
                    }
                ],
                "role": "assistant",
            },
            {"role": "tool", "tool_call_id": "call-1", "name": "weather", "content": "rain"},
        ],
        "temperature": 0.5,
    }
    assert read(folder, other) == read(folder, CHATS["a call and its answer"])


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_pictures_are_known_by_what_they_are(tmp_path: Path) -> None:
    """What comes before one is known anyway; what comes after it only after the same one."""
    folder = folder_with(PARTS, tmp_path)

    def blocks(url: str, *further: str) -> list[int]:
        before, after = {"type": "text", "text": "x" * 200}, {"type": "text", "text": "y" * 200}
        parts = [before, picture(url), after, *map(picture, further)]
        found = read(folder, {"messages": [{"role": "user", "content": parts}]})
        assert found.tokens > 400
        return list(found.blocks)

    data = "data:image/png;base64," + "A" * 5000
    one, other = blocks("https://a/1.png"), blocks("https://a/2.png")
    assert one == blocks("https://a/1.png")
    assert blocks(data) == blocks(data)
    same = sum(a == b for a, b in zip(one, other, strict=True))
    assert 6 <= same < len(one) - 5
    longer = blocks("https://a/1.png", data)
    assert longer[: len(one) - 1] == one[: len(one) - 1]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": 3},
        {"role": "user", "content": [picture("u") | {"image_url": "u"}]},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": "no JSON"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": "[1]"}}]},
        {"role": "system", "content": "x", "tools": [WEATHER]},
    ],
)
def test_what_sglang_refuses_or_we_do_not_know_has_no_prefix(
    tmp_path: Path, message: dict[str, Any]
) -> None:
    folder = folder_with(PARTS, tmp_path)
    chat = {"messages": [USER, message]}
    assert read(folder, chat) == Prompt(len(json.dumps(chat)) // 4)

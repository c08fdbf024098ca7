"""What the router takes prompts for: the tokens that an instance will make of them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from array import array
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kunserve_sglang.core.blocks import block_hashes
from kunserve_sglang.core.prompt_format import PromptFormat
from kunserve_sglang.router.proxy.prefix_index import Prompt
from kunserve_sglang.router.proxy.prompts import PromptReader

# --- prompts ------------------------------------------------------------------------------------

TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
[{{ message['role'] }}] {{ message['content'] }}
{%- if message.tool_calls %} calls {{ message.tool_calls | tojson }}{% endif %}
{%- endfor %}
{%- if thinking is defined %} thinks{% endif %}
{%- if add_generation_prompt %}
[assistant]{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of words that begins texts with a token of its own, as Llama's does."""
    words = [
        "<s>",
        "[",
        "user",
        "system",
        "assistant",
        "]",
        "hello",
        "what",
        "is",
        "a",
        "KV",
        "cache",
        "?",
        "thinks",
    ]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*words, "<unk>"])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def read(form: PromptFormat | None, path: str, body: Any) -> Prompt:
    async def once() -> Prompt:
        reader = PromptReader(form)
        try:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await reader.read(path, data)
        finally:
            reader.close()

    return asyncio.run(once())


CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hello " * 100}]},
    {
        "messages": [
            {"role": "system", "content": "what is a KV cache ? " * 20},
            {"role": "user", "content": "hello"},
        ],
        "chat_template_kwargs": {"thinking": True},
    },
]


@pytest.mark.parametrize("chat", CHATS)
def test_chats_become_the_tokens_that_transformers_makes(
    folder: Path, chat: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        chat["messages"],
        tokenize=False,
        add_generation_prompt=True,
        **chat.get("chat_template_kwargs", {}),
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = read(PromptFormat(folder=str(folder)), "/v1/chat/completions", chat)
    assert found == Prompt(len(ids), block_hashes(array("q", ids)))
    assert len(found.blocks) > 1


def test_texts_become_the_tokens_that_transformers_makes(folder: Path) -> None:
    from transformers import AutoTokenizer

    text = "what is a KV cache ? " * 30
    ids = AutoTokenizer.from_pretrained(folder).encode(text)
    expected = Prompt(len(ids), block_hashes(array("q", ids)))
    form = PromptFormat(folder=str(folder))
    assert read(form, "/generate", {"text": text}) == expected
    assert read(form, "/v1/completions", {"prompt": text}) == expected
    assert read(form, "/v1/completions", {"prompt": ids}) == expected
    assert read(None, "/generate", {"input_ids": ids}) == expected
    salted = {"input_ids": ids, "extra_key": "b", "cache_salt": "a"}
    assert read(None, "/v1/chat/completions", {**salted, "messages": []}) == Prompt(
        len(ids), block_hashes(array("q", ids), "ab")
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": ["several", "prompts"]}),
        ("/generate", {"text": "a picture", "image_data": "x"}),
        ("/generate", {"input_ids": [1, 1 << 80]}),
        ("/generate", {"sampling_params": {}}),
        ("/generate", b"{"),
        ("/generate", b"\xff" * 40),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}),
        ("/v1/embeddings", {"input": "hello"}),
    ],
)
def test_what_cannot_be_read_has_no_known_prefix(folder: Path, path: str, body: Any) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = read(PromptFormat(folder=str(folder)), path, data)
    assert found == Prompt(len(data) // 4)


def test_large_prompts_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is tokenized few wait, others go by load, and nothing is done for who has left."""
    go_on, done = threading.Event(), []

    def read(_reader: PromptReader, _reads: Any, body: bytes) -> Prompt:
        assert go_on.wait(20)
        done.append(body)
        return Prompt(0)

    monkeypatch.setattr(PromptReader, "_read", read)
    prompts = [bytes([number]) * 600_000 for number in range(4)]

    async def work() -> None:
        reader = PromptReader()
        try:
            first, second, third = (
                asyncio.create_task(reader.read("/generate", p)) for p in prompts[:3]
            )
            await asyncio.sleep(0)
            # There is time for no fourth; and one that is larger still always goes by load.
            for body in (prompts[3], bytes(2 << 20)):
                assert await reader.read("/generate", body) == Prompt(len(body) // 4)
            second.cancel()
            await asyncio.wait([second])
            fourth = asyncio.create_task(reader.read("/generate", prompts[3]))
            await asyncio.sleep(0)
            go_on.set()
            await asyncio.gather(first, third, fourth)
        finally:
            go_on.set()
            reader.close()

    asyncio.run(asyncio.wait_for(work(), 30))
    assert done == [prompts[0], prompts[2], prompts[3]]


def test_a_template_that_fails_leaves_chats_unread(folder: Path, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hello hello"}]}
    size = Prompt(len(json.dumps(chat)) // 4)
    refuses = tmp_path / "refuses.jinja"
    refuses.write_text("{{ raise_exception('no') }}")
    for template in (str(refuses), "by_name", str(tmp_path / "none.jinja")):
        form = PromptFormat(folder=str(folder), chat_template=template)
        assert read(form, "/v1/chat/completions", chat) == size
    fine = tmp_path / "fine.jinja"
    fine.write_text("{{ messages[0].content }}")
    form = PromptFormat(folder=str(folder), chat_template=str(fine))
    assert read(form, "/v1/chat/completions", chat) == Prompt(2, [])


def test_the_reader_needs_no_serving_runtime() -> None:
    code = (
        "import sys, kunserve_sglang.router.proxy.prompts, kunserve_sglang.router.app\n"
        "assert not {'sglang', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

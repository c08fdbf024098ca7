"""A router with `--dispatch lmetric`, mock instances, and what it takes prompts for."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kunserve_sglang.core.blocks import BLOCK_TOKENS, block_hashes
from kunserve_sglang.core.settings import DispatchPolicy, PromptFormat
from kunserve_sglang.router.proxy.prefix_index import Prompt
from kunserve_sglang.router.proxy.prompts import PromptReader
from tests.support.mock_worker import Background, Canned, MockWorker
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

SHARED = tuple(range(3 * BLOCK_TOKENS))


def ask(router: RouterCluster, *more: int) -> None:
    assert router.post("/generate", {"input_ids": [*SHARED, *more]}).status == 200


def blocks() -> list[int]:
    return block_hashes(array("q", SHARED))


@pytest.fixture
def lmetric(start_router: Callable[..., RouterCluster]) -> RouterCluster:
    router = start_router(2, dispatch=DispatchPolicy.LMETRIC)
    for instance in router.instances:
        instance.worker.answers["/generate"] = Canned({"text": ""})
    return router


def chosen(router: RouterCluster) -> list[int]:
    return [len(i.worker.requests("/generate")) for i in router.instances]


def known_tokens(router: RouterCluster, number: int) -> float:
    name = f'kunserve:prefix_index_tokens{{instance="{number}"}} '
    lines = router.get("/metrics").body.decode().splitlines()
    return next((float(x.removeprefix(name)) for x in lines if x.startswith(name)), -1)


def in_step(router: RouterCluster) -> None:
    until(lambda: all(known_tokens(router, i.number) >= 0 for i in router.instances))


def test_requests_go_where_their_prefix_is(lmetric: RouterCluster) -> None:
    lmetric.instances[1].cache(blocks())
    until(lambda: known_tokens(lmetric, 1) == len(SHARED))
    for i in range(4):
        ask(lmetric, i)
    assert chosen(lmetric) == [0, 4]
    metrics = lmetric.get("/metrics").body
    assert b"kunserve:prompt_tokens_total 388.0" in metrics
    assert b"kunserve:predicted_hit_tokens_total 384.0" in metrics


def test_a_prefix_on_its_way_counts_until_it_is_flushed(lmetric: RouterCluster) -> None:
    in_step(lmetric)
    for i in range(3):
        ask(lmetric, i)
    assert sorted(chosen(lmetric)) == [0, 3]
    for instance in lmetric.instances:
        instance.worker.answers["/flush_cache"] = Canned("ok")
    assert lmetric.post("/flush_cache").status == 200
    for _ in range(2):
        ask(lmetric)
        lmetric.post("/flush_cache")
    assert min(chosen(lmetric)) >= 1


def test_an_evicted_prefix_draws_nobody(lmetric: RouterCluster) -> None:
    lmetric.instances[1].cache(blocks())
    until(lambda: known_tokens(lmetric, 1) == len(SHARED))
    lmetric.instances[1].cache(())
    until(lambda: known_tokens(lmetric, 1) == 0)
    lmetric.instances[0].cache(blocks()[:1])
    until(lambda: known_tokens(lmetric, 0) == BLOCK_TOKENS)
    ask(lmetric)
    assert chosen(lmetric) == [1, 0]


def test_a_large_batch_outweighs_a_prefix(lmetric: RouterCluster) -> None:
    lmetric.instances[1].cache(blocks()[:2])
    lmetric.instances[1].set_load(1000, running=3)
    until(lambda: known_tokens(lmetric, 1) == 2 * BLOCK_TOKENS)
    until(lambda: lmetric.described(1)["running"] == 3)
    ask(lmetric)
    assert chosen(lmetric) == [1, 0], "96 tokens beside nobody against 32 beside three"


def test_a_restarted_router_asks_anew(lmetric: RouterCluster) -> None:
    lmetric.instances[1].cache(blocks())
    until(lambda: known_tokens(lmetric, 1) == len(SHARED))
    lmetric.stop_router()
    lmetric.start_router()
    until(lambda: known_tokens(lmetric, 1) == len(SHARED), timeout_s=20)
    lmetric.ready(2)
    ask(lmetric)
    assert chosen(lmetric) == [0, 1]


def test_plain_servers_are_known_by_what_was_sent_there(
    start_router: Callable[..., RouterCluster],
) -> None:
    router = start_router(0, dispatch=DispatchPolicy.LMETRIC)
    background = Background()
    workers = [MockWorker(background) for _ in range(2)]
    try:
        for worker in workers:
            worker.answers["/server_info"] = Canned({"max_total_num_tokens": 1000})
            worker.answers["/generate"] = Canned({"text": ""})
            worker.answers["/flush_cache"] = Canned("ok")
            assert router.post("/workers", {"url": worker.url}).status == 201
        until(lambda: all(i["serving"] for i in router.status()["instances"]))
        ask(router)
        first = next(w for w in workers if w.requests("/generate"))
        for i in range(3):
            ask(router, i)
        assert len(first.requests("/generate")) == 4
    finally:
        router.stop_router()
        for worker in workers:
            worker.stop()
        background.stop()
        router.start_router()


def test_other_policies_ask_for_no_reports(start_router: Callable[..., RouterCluster]) -> None:
    router = start_router(2, dispatch=DispatchPolicy.LEAST_LOAD)
    router.instances[0].cache(blocks())
    until(lambda: router.instances[0].cached)
    assert not any(i.obeyed["Welcome"] for i in router.instances)
    assert known_tokens(router, 0) == -1


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

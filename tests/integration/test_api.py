"""What clients use, before, during and after a drop: the answers are the same."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.integration.conftest import Client

pytestmark = pytest.mark.usefixtures("phase")

QUESTION: Any = [{"role": "user", "content": "Name three colours of the rainbow."}]


@pytest.fixture
def api(cluster: Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_models(api: openai.OpenAI) -> None:
    assert len(api.models.list().data) == 1


def test_chat(api: openai.OpenAI, same: Any) -> None:
    answer = api.chat.completions.create(
        model="default", messages=QUESTION, max_tokens=24, temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 24
    same(answer.choices[0].message.content)


def test_streamed_chat_is_the_whole_answer(api: openai.OpenAI, same: Any) -> None:
    chunks = api.chat.completions.create(
        model="default", messages=QUESTION, max_tokens=24, temperature=0, stream=True
    )
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert len(pieces) > 5
    same("".join(pieces))


def test_completion_with_logprobs(api: openai.OpenAI, same: Any) -> None:
    answer = api.completions.create(
        model="default", prompt="The capital of France is", max_tokens=6, temperature=0, logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert all(p is not None and p <= 0 for p in logprobs.token_logprobs)
    assert len(logprobs.top_logprobs) == 6
    same((answer.choices[0].text, [round(p or 0, 3) for p in logprobs.token_logprobs]))


@pytest.mark.parametrize("asks", [{}, {"logprob_start_len": 0, "top_logprobs_num": 2}], ids=str)
def test_logprobs_of_a_prompt_in_chunks(
    cluster: Client, same_of: Any, asks: dict[str, Any]
) -> None:
    """Several chunks of it are in flight at once while layers are elsewhere."""
    body = {
        "text": "The rain in Spain stays mainly in the plain. " * 80,
        "return_logprob": True,
        "sampling_params": {"max_new_tokens": 12, "temperature": 0},
        **asks,
    }
    status, answer = cluster.call("POST", "/generate", body)
    assert status == 200, answer
    meta = answer["meta_info"]
    assert meta["prompt_tokens"] > 3 * 256
    assert len(meta["output_token_logprobs"]) == 12
    if asks:
        assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]
    logprobs = [*meta["input_token_logprobs"], *meta["output_token_logprobs"]]
    rounded = [(round(p, 2) if p is not None else p, token) for p, token, _ in logprobs]
    same_of(str(asks), (answer["text"], rounded))


def test_json_schema(api: openai.OpenAI, same: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    answer = api.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Describe Paris as JSON."}],
        max_tokens=48,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": schema, "strict": True},
        },
    )
    content = json.loads(answer.choices[0].message.content or "")
    assert set(content) == {"city", "big"}
    same(content)


def test_penalties_stop_strings_and_n(api: openai.OpenAI, same: Any) -> None:
    answer = api.completions.create(
        model="default",
        prompt="one two three four",
        max_tokens=20,
        temperature=0,
        n=2,
        stop=["ten", "\n\n"],
        frequency_penalty=0.5,
        presence_penalty=0.3,
    )
    texts = [choice.text for choice in answer.choices]
    assert len(texts) == 2
    assert texts[0] == texts[1]
    assert "ten" not in texts[0]
    same(texts[0])


def test_sampling_with_a_temperature(api: openai.OpenAI) -> None:
    answer = api.completions.create(
        model="default",
        prompt="Once upon a time",
        max_tokens=12,
        temperature=0.9,
        top_p=0.8,
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
    )
    assert answer.choices[0].text


def test_a_prompt_longer_than_any_pool_gets_the_numbers(cluster: Client, same: Any) -> None:
    """A request that can never fit, not even after a drop, fails clearly in every mode."""
    status, answer = cluster.call(
        "POST",
        "/generate",
        {"input_ids": [100] * 8000, "sampling_params": {"max_new_tokens": 4}},
    )
    assert status == 400
    message = answer["error"]["message"]
    assert "8000" in message
    same(message)


def test_frontend_program(cluster: Client, same: Any) -> None:
    import sglang as sgl

    @sgl.function
    def program(s: Any, subject: str) -> None:
        s += f"Q: Is {subject} a colour?\nA:"
        s += sgl.gen("reason", max_tokens=8, temperature=0, stop="\n")
        s += "\nIn one word:" + sgl.select("verdict", choices=[" yes", " no"])

    sgl.set_default_backend(sgl.RuntimeEndpoint(cluster.url))
    states = program.run_batch([{"subject": "red"}, {"subject": "iron"}])
    assert {s["verdict"] for s in states} <= {" yes", " no"}
    same([(s["reason"], s["verdict"]) for s in states])

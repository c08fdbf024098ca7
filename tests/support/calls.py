"""Calls of clients, drawn at random from all that `asks` lists."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import Any

from tests.support.asks import CHAT, COMPLETION, GENERATE, SAMPLING, Draw
from tests.support.schedules import Script, random_scripts
from tests.support.script import Add, Call, Pause

_GATES = ("drop 0,1", "rebalance 0,1", "restore 0,1", "drop 0,1")
"""Capacities grow once more when the KV has followed its layers after a drop."""

_LIKELY = {
    "stream": 0.6,
    "stop": 0.3,
    "return_logprob": 0.4,
    "logprob_start_len": 0.8,
    "logprobs": 0.4,
}
"""The share of calls that ask for what an instance does most about, of those that ask at all."""

_ONE_OF = ("json_schema", "regex", "ebnf", "response_format")


def calling_scripts(seed: int) -> list[Script]:
    """For a pair of members: clients' calls in place of requests, across all transitions.

    Twice all that run are computed again from what they have produced, as after a retraction.
    """
    rng = random.Random(seed)
    return [_calling(rng, script) for script in random_scripts(seed, 2, _GATES)]


def _calling(rng: random.Random, script: Script) -> Script:
    calling: Script = []
    for step, action in script:
        if isinstance(action, Add):
            action = _call(rng, action)
        calling.append((step, action))
    calling += [(rng.randrange(calling[-1][0] + 1), Pause("retract")) for _ in range(2)]
    return sorted(calling, key=lambda entry: entry[0])


def _call(rng: random.Random, add: Add) -> Call:
    """A client's call in place of this request.

    Most ask for a few things, some for many, and some for nothing.
    """
    share = rng.choice((0.0, 0.1, 0.2, 0.5))
    endpoint = rng.choice(("generate", "generate", "chat", "completions"))
    body = {"generate": _generate, "chat": _chat, "completions": _completion}[endpoint]
    return Call(add.rid, endpoint, body(rng, share, add))


def _drawn(rng: random.Random, share: float, fields: dict[str, Draw]) -> dict[str, Any]:
    """Some of the fields, with at most one grammar: a request may be bound by one."""
    drawn = {
        name: value(rng)
        for name, value in fields.items()
        if rng.random() < max(share, bool(share) * _LIKELY.get(name, 0.0))
    }
    grammars = [name for name in _ONE_OF if name in drawn]
    for name in grammars[1:]:
        del drawn[name]
    return drawn


def _generate(rng: random.Random, share: float, add: Add) -> dict[str, Any]:
    prompts = _prompts(rng, add.prompt)
    body = _drawn(rng, share, GENERATE)
    if not body.get("return_logprob"):
        for name in ("logprob_start_len", "top_logprobs_num", "token_ids_logprob"):
            body.pop(name, None)
    elif "logprob_start_len" in body:
        body["logprob_start_len"] = min(body["logprob_start_len"], *(len(p) - 1 for p in prompts))
    told = {"temperature": 0.0, "ignore_eos": True, **_drawn(rng, share, SAMPLING)}
    if rng.random() < 0.3:
        body["text"] = _one_or_many([_text(prompt) for prompt in prompts])
    else:
        body["input_ids"] = _one_or_many([list(prompt) for prompt in prompts])
    if "min_new_tokens" in told:
        told["min_new_tokens"] = min(told["min_new_tokens"], add.new_tokens)
    return {**body, "sampling_params": {**told, "max_new_tokens": add.new_tokens}}


def _chat(rng: random.Random, share: float, add: Add) -> dict[str, Any]:
    body = _openai(rng, share, CHAT, add)
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    if body.get("stream"):
        body.pop("return_meta_info", None)  # refused together
    body["max_completion_tokens"] = add.new_tokens
    words = _text(add.prompt)
    cut = rng.randrange(len(words))
    said = [("system", words[:cut]), ("user", words[cut:])]
    body["messages"] = [{"role": who, "content": what} for who, what in said]
    if body.get("continue_final_message"):
        body["messages"].append({"role": "assistant", "content": "so"})
    if body.get("n", 1) > 1:
        _count_at_the_end(body)
    return body


def _completion(rng: random.Random, share: float, add: Add) -> dict[str, Any]:
    body = _openai(rng, share, COMPLETION, add)
    prompts = _prompts(rng, add.prompt)
    if rng.random() < 0.7:
        body["prompt"] = _one_or_many([_text(prompt) for prompt in prompts])
    else:
        body["prompt"] = _one_or_many([list(prompt) for prompt in prompts])
    if body.get("n", 1) * len(prompts) > 1:
        _count_at_the_end(body)
    return {**body, "max_tokens": add.new_tokens}


def _openai(rng: random.Random, share: float, fields: dict[str, Draw], add: Add) -> dict[str, Any]:
    body = {"temperature": 0.0, "ignore_eos": True, **_drawn(rng, share, fields)}
    if "min_tokens" in body:
        body["min_tokens"] = min(body["min_tokens"], add.new_tokens)
    if not body.get("stream"):
        body.pop("stream_options", None)
    return body


def _count_at_the_end(body: dict[str, Any]) -> None:
    """Counts of several choices together differ while they come in an order of their own."""
    if "stream_options" in body:
        body["stream_options"]["continuous_usage_stats"] = False


def _prompts(rng: random.Random, prompt: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Mostly one; or several that share a beginning."""
    if rng.random() < 0.8:
        return [prompt]
    return [prompt, prompt[: len(prompt) // 2 + 1], (*prompt[:20], *prompt[-2:])]


def _one_or_many(prompts: list[Any]) -> Any:
    return prompts[0] if len(prompts) == 1 else prompts


def _text(prompt: Sequence[int]) -> str:
    """A letter a token, so that prompts share beginnings as their tokens do."""
    return "".join(string.ascii_lowercase[token % 26] for token in prompt)

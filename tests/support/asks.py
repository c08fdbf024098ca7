"""All that a request may ask for, drawn at random; a field of SGLang's that is in no list fails.

Greedy answers only: others differ from run to run by themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from tests.support.tiny_model import VOCABULARY

Draw = Callable[[random.Random], Any]


def _token(rng: random.Random) -> int:
    return rng.randrange(3, VOCABULARY)


def _tokens(rng: random.Random) -> list[int]:
    return [_token(rng) for _ in range(rng.randrange(1, 4))]


def _letters(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghij") for _ in range(rng.randrange(1, 3)))


SAMPLING: dict[str, Draw] = {
    "stop": lambda rng: rng.choice((_letters(rng), [_letters(rng), _letters(rng)])),
    "stop_token_ids": lambda rng: set(_tokens(rng) * 8),
    "stop_regex": lambda rng: rng.choice(("[0-9]{2}", "[xyz]")),
    "frequency_penalty": lambda rng: rng.uniform(-1, 2),
    "presence_penalty": lambda rng: rng.uniform(-1, 2),
    "repetition_penalty": lambda rng: rng.uniform(0.7, 1.8),
    "min_new_tokens": lambda rng: rng.randrange(1, 12),
    "json_schema": lambda _: '{"type": "array", "items": {"type": "boolean"}}',
    "regex": lambda rng: rng.choice(("[a-z]{4,20}", "(yes|no)+", "[0-9]{3}-[0-9]{3}")),
    "ebnf": lambda _: 'root ::= [a-d]+ "." ',
    "ignore_eos": lambda rng: rng.random() < 0.5,
    "no_stop_trim": lambda rng: rng.random() < 0.5,
    "skip_special_tokens": lambda rng: rng.random() < 0.5,
    "stream_interval": lambda rng: rng.randrange(1, 5),
    "logit_bias": lambda rng: {str(_token(rng)): rng.uniform(-5, 5) for _ in range(3)},
    "custom_params": lambda _: {"colour": "blue"},
}

REQUEST: dict[str, Draw] = {
    "return_logprob": lambda _: True,
    "logprob_start_len": lambda rng: rng.choice((0, 1, 3)),
    "top_logprobs_num": lambda rng: rng.randrange(1, 4),
    "token_ids_logprob": _tokens,
    "stream": lambda rng: rng.random() < 0.5,
    "extra_key": lambda rng: rng.choice(("tenant-a", "tenant-b")),
    "routing_key": lambda rng: rng.choice(("route-a", "route-b")),
    "no_logs": lambda _: True,
}

SAMPLING_NOT_DRAWN = {
    "max_new_tokens": "every request has one",
    "temperature": "greedy",
    "top_p": "greedy",
    "top_k": "greedy",
    "min_p": "greedy",
    "sampling_seed": "greedy",
    "n": "the tokenizer's process makes several requests of it",
    "structural_tag": "as json_schema, with tags of a chat template around it",
    "spaces_between_special_tokens": "read where text is made of tokens, behind the scheduler",
    "stop_strs": "made of `stop`",
    "stop_regex_strs": "made of `stop_regex`",
    "stop_str_max_len": "made of `stop`",
    "stop_regex_max_len": "made of `stop_regex`",
    "is_normalized": "set by SGLang",
}

REQUEST_NOT_DRAWN = {
    **dict.fromkeys(("rid", "input_ids", "sampling_params"), "every request has one"),
    **dict.fromkeys(("input_text", "http_worker_ipc", "time_stats"), "passed through"),
    **dict.fromkeys(
        ("mm_inputs", "token_type_ids", "need_wait_for_mm_inputs", "num_items_assigned"),
        "the model has no eyes",
    ),
    **dict.fromkeys(("mm_data_mooncake", "encoder_urls"), "the model has no eyes"),
    **dict.fromkeys(
        ("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key"),
        "disaggregation is refused",
    ),
    **dict.fromkeys(("decode_tp_size", "disagg_prefill_dp_rank"), "disaggregation is refused"),
    "routed_dp_rank": "one instance is one rank of data parallelism",
    **dict.fromkeys(("session_id", "session_params"), "sessions are refused"),
    "lora_id": "adapters are refused",
    "custom_logit_processor": "has to be allowed by a flag of its own",
    "positional_embed_overrides": "for models with other positions",
    **dict.fromkeys(("return_routed_experts", "routed_experts_start_len"), "no experts"),
    "return_indexer_topk": "for models with sparse attention",
    "multi_item_delimiter_indices": "scoring has a flag of its own",
    "input_embeds": "drawn in place of a prompt's tokens, by a test of its own",
    "return_hidden_states": "has to be allowed by a flag, and changes what graphs contain",
    "return_sampling_mask": "says which tokens could have been drawn; greedy",
    "return_entropy": "only the frontend of SGLang's own scoring asks for it",
    "return_bytes": "read behind the scheduler",
    "require_reasoning": "needs a parser for reasoning, which a model has",
    "priority": "has to be allowed by a flag, and changes who is first",
}

_ONE_OF = ("json_schema", "regex", "ebnf")
"""A request may be bound by one grammar."""


def unlisted() -> set[str]:
    """Fields of SGLang's request types that are neither drawn nor left out for a reason."""
    sampling = {field.name for field in msgspec.structs.fields(SamplingParams)}
    request = {field.name for field in msgspec.structs.fields(TokenizedGenerateReqInput)}
    return (sampling ^ (SAMPLING.keys() | SAMPLING_NOT_DRAWN)) | (
        request ^ (REQUEST.keys() | REQUEST_NOT_DRAWN)
    )


def draw(rng: random.Random, prompt: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of sampling and fields of a request with a prompt of this length.

    Most ask for a few things, some for many, and some for nothing.
    """
    share = rng.choice((0.0, 0.1, 0.2, 0.5))
    sampling = {name: value(rng) for name, value in SAMPLING.items() if rng.random() < share}
    for name in rng.sample(_ONE_OF, 2):
        sampling.pop(name, None)
    asks = {name: value(rng) for name, value in REQUEST.items() if rng.random() < share}
    if not asks.get("return_logprob"):
        for name in ("logprob_start_len", "top_logprobs_num", "token_ids_logprob"):
            asks.pop(name, None)
    elif "logprob_start_len" in asks:
        asks["logprob_start_len"] = min(asks["logprob_start_len"], prompt - 1)
    return sampling, asks

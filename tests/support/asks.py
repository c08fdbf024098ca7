"""All that a client may ask for, drawn at random; a field of SGLang's that is in no list fails.

Greedy answers only: others differ from run to run by themselves, but for those with seeds, which
have tests of their own.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from kunserve_sglang.testing.tiny_model import VOCABULARY

Draw = Callable[[random.Random], Any]


def _token(rng: random.Random) -> int:
    return rng.randrange(3, VOCABULARY)


def _tokens(rng: random.Random) -> list[int]:
    return [_token(rng) for _ in range(rng.randrange(1, 4))]


def _letters(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghij") for _ in range(rng.randrange(1, 3)))


SAMPLING: dict[str, Draw] = {
    "stop": lambda rng: rng.choice((_letters(rng), [_letters(rng) + "a" for _ in range(12)])),
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
    "n": lambda rng: rng.choice((1, 2, 3)),
    "spaces_between_special_tokens": lambda rng: rng.random() < 0.5,
}

REQUEST: dict[str, Draw] = {
    "return_logprob": lambda _: True,
    "logprob_start_len": lambda rng: rng.choice((0, 1, 3)),
    "top_logprobs_num": lambda rng: rng.randrange(1, 4),
    "token_ids_logprob": _tokens,
    "stream": lambda rng: rng.random() < 0.8,
    "extra_key": lambda rng: rng.choice(("tenant-a", "tenant-b")),
    "routing_key": lambda rng: rng.choice(("route-a", "route-b")),
    "no_logs": lambda _: True,
}

GENERATE: dict[str, Draw] = {
    **REQUEST,
    "return_text_in_logprobs": lambda rng: rng.random() < 0.5,
    "return_prompt_token_ids": lambda _: True,
}

_FOR_BOTH: dict[str, Draw] = {
    "frequency_penalty": SAMPLING["frequency_penalty"],
    "presence_penalty": SAMPLING["presence_penalty"],
    "repetition_penalty": SAMPLING["repetition_penalty"],
    "logit_bias": SAMPLING["logit_bias"],
    "min_tokens": SAMPLING["min_new_tokens"],
    "stop": SAMPLING["stop"],
    "stop_token_ids": lambda rng: _tokens(rng) * 2,
    "stop_regex": SAMPLING["stop_regex"],
    "regex": SAMPLING["regex"],
    "ebnf": SAMPLING["ebnf"],
    "response_format": lambda _: {"type": "json_object"},
    "n": SAMPLING["n"],
    "no_stop_trim": SAMPLING["no_stop_trim"],
    "skip_special_tokens": SAMPLING["skip_special_tokens"],
    "ignore_eos": SAMPLING["ignore_eos"],
    "custom_params": SAMPLING["custom_params"],
    "stream": REQUEST["stream"],
    "stream_options": lambda rng: {
        "include_usage": rng.random() < 0.7,
        "continuous_usage_stats": rng.random() < 0.5,
    },
    "extra_key": REQUEST["extra_key"],
    "cache_salt": lambda rng: rng.choice(("salt-a", "salt-b")),
    "user": lambda _: "somebody",
    "seed": lambda rng: rng.randrange(100),
}

CHAT: dict[str, Draw] = {
    **_FOR_BOTH,
    "logprobs": lambda rng: rng.random() < 0.7,
    "top_logprobs": lambda rng: rng.randrange(1, 4),
    "return_prompt_token_ids": lambda _: True,
    "return_meta_info": lambda _: True,
    "continue_final_message": lambda rng: rng.random() < 0.5,
    "max_tokens": lambda rng: rng.randrange(1, 30),  # `max_completion_tokens` counts
}

COMPLETION: dict[str, Draw] = {
    **_FOR_BOTH,
    "logprobs": lambda rng: rng.randrange(0, 4),
    "json_schema": SAMPLING["json_schema"],
    "echo": lambda rng: rng.random() < 0.5,
}

SAMPLING_NOT_DRAWN = {
    "max_new_tokens": "every request has one",
    "temperature": "greedy",
    "top_p": "greedy",
    "top_k": "greedy",
    "min_p": "greedy",
    "sampling_seed": "greedy; a test of its own",
    "structural_tag": "as json_schema, with tags of a chat template around it",
    "stop_strs": "made of `stop`",
    "stop_regex_strs": "made of `stop_regex`",
    "stop_str_max_len": "made of `stop`",
    "stop_regex_max_len": "made of `stop_regex`",
    "is_normalized": "set by SGLang",
}

_NO_EYES = "the model has no eyes"

REQUEST_NOT_DRAWN = {
    **dict.fromkeys(("rid", "input_ids", "sampling_params"), "every request has one"),
    **dict.fromkeys(("input_text", "http_worker_ipc", "time_stats"), "passed through"),
    **dict.fromkeys(
        ("mm_inputs", "token_type_ids", "need_wait_for_mm_inputs", "num_items_assigned"),
        _NO_EYES,
    ),
    **dict.fromkeys(("mm_data_mooncake", "encoder_urls"), _NO_EYES),
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
    "require_reasoning": "needs a parser for reasoning, which a model has; a test of its own",
    "priority": "has to be allowed by a flag, and changes who is first",
}

_INTERNAL = {"input_text", "time_stats", "mm_inputs", "token_type_ids"}
"""Made on the way from a client's request to the scheduler's."""

GENERATE_NOT_DRAWN = {
    **{name: why for name, why in REQUEST_NOT_DRAWN.items() if name not in _INTERNAL},
    **dict.fromkeys(("text", "input_ids"), "every call has one, a list of them or several"),
    **dict.fromkeys(("image_data", "video_data", "audio_data", "modalities"), _NO_EYES),
    **dict.fromkeys(("mm_hashes", "use_audio_in_video", "images_config"), _NO_EYES),
    **dict.fromkeys(("max_dynamic_patch", "min_dynamic_patch"), _NO_EYES),
    **dict.fromkeys(("image_max_dynamic_patch", "video_max_dynamic_patch"), _NO_EYES),
    "lora_path": "adapters are refused",
    **dict.fromkeys(("log_metrics", "custom_labels", "external_trace_header"), "metrics only"),
    "received_time": "metrics only",
    "conversation_id": "read by nobody in the scheduler",
    "background": "whether a client that has left is looked for",
}

_IN_NEITHER = {
    "model": "every call has one",
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_p"), "greedy"),
    **dict.fromkeys(("return_hidden_states", "custom_logit_processor"), "allowed by a flag"),
    "priority": "allowed by a flag",
    **dict.fromkeys(("return_routed_experts", "routed_experts_start_len"), "no experts"),
    "return_cached_tokens_details": "what is found cached differs from run to run",
    "lora_path": "adapters are refused",
    **dict.fromkeys(("session_id", "session_params"), "sessions are refused"),
    "images_config": _NO_EYES,
    **dict.fromkeys(("bootstrap_host", "bootstrap_port", "bootstrap_room"), "disaggregation"),
    "disagg_prefill_dp_rank": "disaggregation is refused",
    **dict.fromkeys(("routed_dp_rank", "data_parallel_rank"), "one rank of data parallelism"),
    "rid": "what clients call a request says nothing of its answer",
}

CHAT_NOT_DRAWN = {
    **_IN_NEITHER,
    **dict.fromkeys(("messages", "max_completion_tokens"), "every call has one"),
    **dict.fromkeys(("tools", "tool_choice", "parallel_tool_calls"), "a parser of the model's"),
    **dict.fromkeys(("reasoning_effort", "separate_reasoning"), "a parser of the model's"),
    **dict.fromkeys(("stream_reasoning", "chat_template_kwargs"), "a parser of the model's"),
    "task": "of a template of the model's",
    **dict.fromkeys(("max_dynamic_patch", "min_dynamic_patch", "use_audio_in_video"), _NO_EYES),
    "input_ids": "in place of messages, as in a call of `generate`",
}

COMPLETION_NOT_DRAWN = {
    **_IN_NEITHER,
    **dict.fromkeys(("prompt", "max_tokens"), "every call has one"),
    **dict.fromkeys(("best_of", "suffix"), "read by nobody in SGLang"),
    "custom_labels": "metrics only",
}


_TYPES: tuple[tuple[set[str], Sequence[dict[str, Any]]], ...] = (
    ({f.name for f in msgspec.structs.fields(SamplingParams)}, (SAMPLING, SAMPLING_NOT_DRAWN)),
    (
        {f.name for f in msgspec.structs.fields(TokenizedGenerateReqInput)},
        (REQUEST, REQUEST_NOT_DRAWN),
    ),
    ({f.name for f in dataclasses.fields(GenerateReqInput)}, (GENERATE, GENERATE_NOT_DRAWN)),
    (set(ChatCompletionRequest.model_fields), (CHAT, CHAT_NOT_DRAWN)),
    (set(CompletionRequest.model_fields), (COMPLETION, COMPLETION_NOT_DRAWN)),
)
"""The fields of each of SGLang's request types, and the two lists that they have to be in."""


def unlisted() -> list[set[str]]:
    """By request type: fields that are in neither list, in both, or in one and not SGLang's."""
    return [
        (fields ^ (drawn.keys() | left.keys())) | (drawn.keys() & left.keys())
        for fields, (drawn, left) in _TYPES
    ]

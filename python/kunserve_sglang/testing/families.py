"""Small models of the families that people run, with random weights; made by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kunserve_sglang.testing.tiny_model import LAYERS, VOCABULARY

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    # So large that answers vary, as those of a trained model do.
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS: Mapping[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
_WINDOWS: Mapping[str, Any] = {"head_dim": 16, "sliding_window": 32}
"""So narrow that all but the shortest requests reach beyond them."""

FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama": ("llama", {}),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {"head_dim": 32}),
    "Phi-3": ("phi3", {}),
    "OLMo-2": ("olmo2", {}),
    "Gemma 2": ("gemma2", {**_WINDOWS, "hidden_act": "gelu_pytorch_tanh"}),
    "Gemma 3": ("gemma3_text", _WINDOWS),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": ("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 64}),
    "Qwen3-MoE": ("qwen3_moe", {**_EXPERTS, "head_dim": 32}),
}
"""By name: transformers' `model_type`, and what differs from the others in its configuration."""


def build(family: str, folder: Path) -> Path:
    """Write a model of this family to `folder`, in fp32, and return it. Same weights every time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, differs = FAMILIES[family]
    torch.manual_seed(20260101)
    config = AutoConfig.for_model(kind, **{**_COMMON, **differs})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder

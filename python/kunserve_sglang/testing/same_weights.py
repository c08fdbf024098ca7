"""One Llama's weights as models of other families, which then have to answer token for token as it.

Real weights without a hub: what is made of them needs no download, and is known to be right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_EXPERTS = 4
_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

Weights = dict[str, torch.Tensor]


def _with_zero_biases(weights: Weights) -> Weights:
    biases = {
        name.removesuffix("weight") + "bias": torch.zeros(len(weight))
        for name, weight in weights.items()
        if re.search(r"[qkv]_proj\.weight$", name)
    }
    return weights | biases


def _fused(weights: Weights) -> Weights:
    """Projections that read the same input are one."""
    whole = dict(weights)
    for first, others, name in (
        ("q_proj", ("k_proj", "v_proj"), "qkv_proj"),
        ("gate_proj", ("up_proj",), "gate_up_proj"),
    ):
        for key in [k for k in whole if f".{first}." in k]:
            parts = [whole.pop(key.replace(first, part)) for part in (first, *others)]
            whole[key.replace(first, name)] = torch.cat(parts)
    return whole


def _with_equal_experts(weights: Weights) -> Weights:
    """Whoever is chosen gives the same, and the shares of those who are add up to one.

    The router is random, so that all are chosen by some tokens.
    """
    named = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    routed: Weights = {}
    for key, weight in weights.items():
        found = re.match(r"(model\.layers\.\d+)\.mlp\.(\w+)\.weight", key)
        if found is None:
            routed[key] = weight
            continue
        moe = f"{found[1]}.block_sparse_moe"
        for expert in range(_EXPERTS):
            routed[f"{moe}.experts.{expert}.{named[found[2]]}.weight"] = weight.clone()
        if found[2] == "gate_proj":
            routed[f"{moe}.gate.weight"] = torch.randn(_EXPERTS, weight.shape[1])
    return routed


EXPRESSED: Mapping[str, tuple[str, Callable[[Weights], Weights], Mapping[str, Any]]] = {
    "Llama": ("llama", dict, {}),
    "Mistral": ("mistral", dict, {"sliding_window": None}),
    "Qwen2": ("qwen2", _with_zero_biases, {}),
    "Phi-3": ("phi3", _fused, {}),
    "Mixtral": (
        "mixtral",
        _with_equal_experts,
        {"num_local_experts": _EXPERTS, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
}
"""By family: transformers' `model_type`, what becomes of the weights, and of the configuration."""


def express(llama: Path, family: str, folder: Path, *, layers: int) -> Path:
    """Write the first `layers` layers of the model in `llama` as one of `family`, in fp32."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, LlamaForCausalLM

    kind, change, differs = EXPRESSED[family]
    torch.manual_seed(20260101)
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    own = model.config
    del model.model.layers[layers:]
    settings = {"tie_word_embeddings": True, **{name: getattr(own, name) for name in _KEPT}}
    config = AutoConfig.for_model(kind, **{**settings, **differs, "num_hidden_layers": layers})
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.dtype = "float32"
    weights = dict(model.state_dict())
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    # Memory that two of them share cannot be written as it is.
    changed = {name: weight.clone() for name, weight in change(weights).items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder

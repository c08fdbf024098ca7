"""Which models can be split between instances."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from torch import nn

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.sglang_seam.model import decoder_layers


def model_of(*layers: nn.Module) -> nn.Module:
    """A model whose decoder stack is made as SGLang's are."""
    stack = nn.Module()
    stack.layers = nn.ModuleList(layers)
    stack.embed_tokens, stack.norm = nn.Embedding(2, 2), nn.LayerNorm(2)
    stack.start_layer, stack.end_layer, stack.pp_group = 0, len(layers), SimpleNamespace()
    model = nn.Module()
    model.model = stack
    return model


def test_a_dense_decoder_can_be_split() -> None:
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    assert decoder_layers(model_of(*layers)) == layers


def test_another_kind_of_model_cannot() -> None:
    with pytest.raises(ConfigurationError, match="not a plain dense decoder"):
        decoder_layers(nn.Linear(2, 2))


def test_a_model_with_experts_cannot() -> None:
    experts = FusedMoE.__new__(FusedMoE)
    nn.Module.__init__(experts)
    with pytest.raises(ConfigurationError, match="has experts"):
        decoder_layers(model_of(nn.Linear(2, 2), nn.Sequential(experts)))

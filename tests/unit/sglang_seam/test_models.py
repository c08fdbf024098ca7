"""Which models can be split between instances."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import PPProxyTensors
from torch import nn

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.instance.parts.engine import Hidden, StageBatch
from kunserve_sglang.sglang_seam.model import LayeredDecoder, decoder_layers
from kunserve_sglang.sglang_seam.trial import try_parts


class Layer(nn.Module):
    """Doubles what it gets; `caches` are the layers whose KV it uses."""

    def __init__(self, *caches: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList(attention(cache) for cache in caches)

    def forward(self, _positions: Any, hidden: torch.Tensor, _batch: Any) -> torch.Tensor:
        return 2 * hidden


class LayerOfPairs(Layer):
    def forward(
        self, _positions: Any, hidden: torch.Tensor, _batch: Any, residual: torch.Tensor | None
    ) -> Any:
        return 2 * hidden, hidden if residual is None else residual + hidden


def attention(layer: int) -> RadixAttention:
    made = RadixAttention.__new__(RadixAttention)
    nn.Module.__init__(made)
    made.layer_id = layer
    return made


class Decoder(nn.Module):
    """A stack that goes through all of its layers, as SGLang's simple ones do."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.embed_tokens, self.norm = nn.Embedding(8, 4), nn.Identity()

    def forward(
        self, input_ids: Any, positions: Any, batch: Any, input_embeds: Any = None
    ) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        return self.through(hidden, positions, batch)

    def through(self, hidden: torch.Tensor, positions: Any, batch: Any) -> Any:
        for layer in self.layers:
            hidden = layer(positions, hidden, batch)
        return self.norm(hidden)


class DecoderOfPairs(Decoder):
    """It scales embeddings, whoever gives them, in place; its norm adds what it gets."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.norm = Sum()

    def through(self, hidden: torch.Tensor, positions: Any, batch: Any) -> Any:
        hidden *= 3
        residual = None
        for number in range(len(self.layers)):
            hidden, residual = self.layers[number](positions, hidden, batch, residual)
        hidden, _ = self.norm(hidden, residual)
        return hidden


class Sum(nn.Module):
    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return hidden + (0 if residual is None else residual), residual


class ScalingDecoder(Decoder):
    """Scaled once more in each part, its hidden states would not be those of the whole."""

    def through(self, hidden: torch.Tensor, positions: Any, batch: Any) -> Any:
        return super().through(3 * hidden, positions, batch)


class NumberingDecoder(Decoder):
    """What a layer computes depends on how many ran before it in the same call."""

    def through(self, hidden: torch.Tensor, positions: Any, batch: Any) -> Any:
        for number, layer in enumerate(self.layers):
            hidden = layer(positions, hidden, batch) + number
        return self.norm(hidden)


class TalkativeDecoder(Decoder):
    """A stage of a pipeline that passes on more than hidden states."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.start_layer, self.end_layer = 0, len(layers)
        self.pp_group = SimpleNamespace(is_first_rank=True, is_last_rank=True)

    def forward(
        self,
        input_ids: Any,
        positions: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        input_embeds: Any = None,  # noqa: ARG002
        pp_proxy_tensors: Any = None,  # noqa: ARG002
    ) -> Any:
        hidden = self.embed_tokens(input_ids)
        return PPProxyTensors({"hidden_states": hidden, "residual": None, "streams": hidden})


def model_of(stack: nn.Module) -> nn.Module:
    model = nn.Module()
    model.model = stack
    return model


def layers_of(kind: type[Layer], count: int = 3) -> list[Layer]:
    return [kind(number) for number in range(count)]


class Stages:
    """Runs layers as they are."""

    ranges = ()

    def __init__(self, decoder: LayeredDecoder) -> None:
        self._decoder = decoder

    def run(
        self, batch: StageBatch, _table: Any, _base: int, layers: LayerRange, hidden: Hidden
    ) -> Hidden:
        return self._decoder.layers(layers, batch.positions, None, hidden)

    def captured(self, _batch: StageBatch, _layers: LayerRange) -> bool:
        return False

    def forget_owners(self) -> None:
        """Nothing is known of them."""


def tried(stack: Decoder) -> LayeredDecoder:
    decoder = LayeredDecoder(model_of(stack))
    try_parts(decoder, Stages(decoder), torch.device("cpu"))
    return decoder


@pytest.mark.parametrize(
    ("kind", "layers"), [(Decoder, Layer), (DecoderOfPairs, LayerOfPairs)], ids=["plain", "pairs"]
)
def test_parts_of_a_stack_come_to_what_the_whole_does(
    kind: type[Decoder], layers: type[Layer]
) -> None:
    stack = kind(*layers_of(layers, 5))
    tokens, positions = torch.tensor([1, 5, 2]), torch.arange(3)
    whole = stack(tokens, positions, None)
    decoder = tried(stack)
    hidden = decoder.embed(tokens, positions, None, None)
    for lo, hi in ((0, 2), (2, 3), (3, 5)):
        hidden = decoder.layers(LayerRange(lo, hi), positions, None, hidden)
    assert torch.equal(decoder.finish(positions, None, hidden), whole)
    assert torch.equal(stack(tokens, positions, None), whole)


@pytest.mark.parametrize(
    ("stack", "why"),
    [
        (ScalingDecoder, "it changes what its layers take in"),
        (NumberingDecoder, "its layers compute something else one by one"),
        (TalkativeDecoder, "its layers pass on streams beside hidden states"),
    ],
)
def test_a_stack_that_cannot_be_cut_is_found_out_at_once(stack: type[Decoder], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why) as error:
        tried(stack(*layers_of(Layer)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("caches", [(), (0,), (1, 2)])
def test_a_layer_that_uses_the_kv_of_another_cannot_be_dropped(caches: tuple[int, ...]) -> None:
    assert len(decoder_layers(model_of(Decoder(Layer(0), Layer(1))))) == 2
    with pytest.raises(ConfigurationError, match="layer 1 uses the KV caches"):
        decoder_layers(model_of(Decoder(Layer(0), Layer(*caches))))


def test_another_kind_of_model_cannot_be_split() -> None:
    for model in (nn.Linear(2, 2), model_of(nn.Linear(2, 2)), model_of(Decoder())):
        with pytest.raises(ConfigurationError, match="not made of embeddings, decoder layers"):
            decoder_layers(model)

"""What KunServe needs to know of a model: its decoder stack, and running part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from sglang.srt.layers.radix_attention import RadixAttention
from torch import nn

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.sglang_seam.stacks import Stack, stack_of


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder layers of a loaded model.

    Raises `ConfigurationError` if it has no stack of them that can be run in parts, or if they do
    not each have a KV cache of their own.
    """
    name = type(model).__name__
    stack = getattr(model, "model", None)
    layers = getattr(stack, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or stack_of(stack) is None:
        raise ConfigurationError(
            f"{name} is not made of embeddings, decoder layers and a final norm, one after the "
            "other; KunServe cannot split it"
        )
    for number, layer in enumerate(layers):
        caches = [part.layer_id for part in layer.modules() if isinstance(part, RadixAttention)]
        if caches != [number]:
            raise ConfigurationError(
                f"{name}: layer {number} uses the KV caches {caches}, not just its own; KunServe "
                "cannot split it"
            )
    return list(layers)


class LayeredDecoder:
    """Runs parts of a live, full model with the model's own code, bit for bit as the whole."""

    def __init__(self, model: nn.Module) -> None:
        """Raises `ConfigurationError` as `decoder_layers`."""
        self.name = type(model).__name__
        self.layer_count = len(decoder_layers(model))
        self._decoder: Any = model.get_submodule("model")
        self._forward: Any = self._decoder.forward
        stack = cast(Stack, stack_of(self._decoder))
        self.embed, self.layers, self.finish = stack.embed, stack.layers, stack.finish

    def install(self, forward: Any) -> None:
        """Let `forward` stand in for the stack's own forward."""
        self._decoder.forward = forward

    def uninstall(self) -> None:
        """The stack runs as a whole again."""
        self._decoder.forward = self._forward

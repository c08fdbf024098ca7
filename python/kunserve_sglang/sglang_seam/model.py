"""What KunServe needs to know of a model: its decoder stack, and running part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.model_executor.forward_batch_info import PPProxyTensors
from torch import nn

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.instance.parts.engine import Hidden


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder layers of a loaded model.

    Raises `ConfigurationError` if it has no such stack, or experts, with which nobody has tried it.
    """
    stack = getattr(model, "model", None)
    layers = getattr(stack, "layers", None)
    needed = ("embed_tokens", "norm", "start_layer", "end_layer", "pp_group")
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(stack, name) for name in needed):
        raise ConfigurationError(
            f"{type(model).__name__} is not a plain dense decoder; KunServe cannot split it"
        )
    if any(isinstance(part, FusedMoE) for part in layers.modules()):
        raise ConfigurationError(
            f"{type(model).__name__} has experts; KunServe splits only dense models so far"
        )
    return list(layers)


class _StageView:
    """A pipeline group as the model sees it while it runs only some of its layers."""

    def __init__(self, group: Any, *, first: bool, last: bool) -> None:
        self._group = group
        self.is_first_rank = first
        self.is_last_rank = last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


class LayeredDecoder:
    """Runs parts of a live, full model with the model's own code.

    SGLang's models know how to run as one stage of a pipeline; the stage is an attribute of the
    decoder stack. Setting it for one call runs any range of layers, bit for bit as the whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layer_count = len(decoder_layers(model))
        self.stack: Any = model.get_submodule("model")
        self._forward: Any = self.stack.forward
        self._group: Any = self.stack.pp_group
        self._middle = _StageView(self._group, first=False, last=False)
        self._ends = {
            "first": _StageView(self._group, first=True, last=False),
            "last": _StageView(self._group, first=False, last=True),
        }

    def embed(self, input_ids: Any, positions: Any, batch: Any, input_embeds: Any) -> Hidden:
        """Token embeddings, as the input of layer 0."""
        out = self._run(
            self._ends["first"], LayerRange(0, 0), input_ids, positions, batch, input_embeds, None
        )
        return out["hidden_states"], out["residual"]

    def layers(self, layers: LayerRange, positions: Any, batch: Any, hidden: Hidden) -> Hidden:
        """Layers `[lo, hi)` on hidden states."""
        out = self._run(self._middle, layers, None, positions, batch, None, _proxy(hidden))
        return out["hidden_states"], out["residual"]

    def finish(self, positions: Any, batch: Any, hidden: Hidden) -> Any:
        """What the stack returns after its last layer: the final norm."""
        end = LayerRange(self.layer_count, self.layer_count)
        return self._run(self._ends["last"], end, None, positions, batch, None, _proxy(hidden))

    def install(self, forward: Any) -> None:
        """Let `forward` stand in for the stack's own forward."""
        self.stack.forward = forward

    def uninstall(self) -> None:
        """The stack runs as a whole again."""
        self.stack.forward = self._forward

    def _run(self, view: Any, layers: LayerRange, *arguments: Any) -> Any:
        input_ids, positions, batch, input_embeds, proxy = arguments
        stack = self.stack
        stack.pp_group, stack.start_layer, stack.end_layer = view, layers.lo, layers.hi
        try:
            return self._forward(input_ids, positions, batch, input_embeds, pp_proxy_tensors=proxy)
        finally:
            stack.pp_group, stack.start_layer, stack.end_layer = self._group, 0, self.layer_count


def _proxy(hidden: Hidden) -> PPProxyTensors:
    return PPProxyTensors({"hidden_states": hidden[0], "residual": hidden[1]})

"""Two ways to run a part of a decoder stack with the stack's own code, whatever its layers take.

SGLang's stacks compute what they need beside their layers (rotations, scales) in their own forward,
each in its way. So it is always that forward that runs, on some of the layers.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from sglang.srt.model_executor.forward_batch_info import PPProxyTensors
from torch import nn

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.instance.parts.engine import Hidden

_PASSED_ON = {"hidden_states", "residual"}
"""What the stages of a group send one another."""


class Stack(Protocol):
    """A decoder stack in parts; `batch` is SGLang's `ForwardBatch`."""

    def embed(self, input_ids: Any, positions: Any, batch: Any, input_embeds: Any) -> Hidden:
        """Token embeddings, as the input of layer 0."""
        ...

    def layers(self, layers: LayerRange, positions: Any, batch: Any, hidden: Hidden) -> Hidden:
        """Layers `[lo, hi)` on hidden states."""
        ...

    def finish(self, positions: Any, batch: Any, hidden: Hidden) -> Any:
        """What the stack returns after its last layer: the final norm."""
        ...


def stack_of(stack: Any) -> Stack | None:
    """How this stack can be run in parts, to be asked before its forward is replaced.

    None if it has not the form of any that can.
    """
    named = ("embed_tokens", "layers", "norm")
    if not all(isinstance(getattr(stack, name, None), nn.Module) for name in named):
        return None
    takes = inspect.signature(type(stack).forward).parameters
    if "pp_proxy_tensors" in takes and all(
        hasattr(stack, name) for name in ("pp_group", "start_layer", "end_layer")
    ):
        return PipelinedStack(stack)
    return LoopedStack(stack) if "input_embeds" in takes else None


class _StageView:
    """A pipeline group as the model sees it while it runs only some of its layers."""

    def __init__(self, group: Any, *, first: bool, last: bool) -> None:
        self._group = group
        self.is_first_rank = first
        self.is_last_rank = last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


class PipelinedStack:
    """One that SGLang can run as a stage of a pipeline.

    The stage is an attribute of the stack. Setting it for one call runs any range of layers.
    """

    def __init__(self, stack: Any) -> None:
        self._stack: Any = stack
        self._forward: Any = stack.forward
        self._whole = LayerRange(0, len(stack.layers))
        self._group: Any = stack.pp_group
        self._first = _StageView(self._group, first=True, last=False)
        self._middle = _StageView(self._group, first=False, last=False)
        self._last = _StageView(self._group, first=False, last=True)

    def embed(self, input_ids: Any, positions: Any, batch: Any, input_embeds: Any) -> Hidden:
        nothing = LayerRange(0, 0)
        return _hidden(
            self._run(self._first, nothing, input_ids, positions, batch, input_embeds, None)
        )

    def layers(self, layers: LayerRange, positions: Any, batch: Any, hidden: Hidden) -> Hidden:
        return _hidden(
            self._run(self._middle, layers, None, positions, batch, None, _proxy(hidden))
        )

    def finish(self, positions: Any, batch: Any, hidden: Hidden) -> Any:
        end = LayerRange(self._whole.hi, self._whole.hi)
        return self._run(self._last, end, None, positions, batch, None, _proxy(hidden))

    def _run(self, view: Any, layers: LayerRange, *arguments: Any) -> Any:
        input_ids, positions, batch, input_embeds, proxy = arguments
        stack = self._stack
        stack.pp_group, stack.start_layer, stack.end_layer = view, layers.lo, layers.hi
        try:
            return self._forward(input_ids, positions, batch, input_embeds, pp_proxy_tensors=proxy)
        finally:
            whole = self._whole
            stack.pp_group, stack.start_layer, stack.end_layer = self._group, whole.lo, whole.hi


def _hidden(out: Any) -> Hidden:
    if more := out.tensors.keys() - _PASSED_ON:
        raise ConfigurationError(
            f"its layers pass on {', '.join(sorted(more))} beside hidden states, which KunServe "
            "does not carry between instances"
        )
    return out["hidden_states"], out.tensors.get("residual")


def _proxy(hidden: Hidden) -> PPProxyTensors:
    return PPProxyTensors({"hidden_states": hidden[0], "residual": hidden[1]})


class _LayersBefore(nn.Module):
    """Stands for all layers before those that run: returns what came out of them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Hidden | None = None

    def forward(self, *_: Any, **__: Any) -> Hidden | None:
        return self.hidden


class _LayersAfter(nn.Module):
    """Stands for all layers after those that run: keeps what these have come to, as it is."""

    def __init__(self, *, pairs: bool) -> None:
        super().__init__()
        self._pairs = pairs
        self.left: Hidden | None = None

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        self.left = hidden, residual
        return self.left if self._pairs else hidden


class LoopedStack:
    """One that goes through all of its `layers` and then its `norm`: both are others for one call.

    What other instances have computed goes in as embeddings, which all such stacks take. Where
    layers hand on pairs of hidden states and residual, it comes out of a layer that stands for all
    those before.
    """

    def __init__(self, stack: Any) -> None:
        self._stack: Any = stack
        self._forward: Any = stack.forward
        self._layers: Any = stack.layers
        self._norm: Any = stack.norm
        self._pairs = "residual" in inspect.signature(type(stack.layers[0]).forward).parameters
        self._parts: dict[LayerRange, tuple[_LayersBefore, nn.ModuleList]] = {}

    def embed(self, input_ids: Any, positions: Any, batch: Any, input_embeds: Any) -> Hidden:
        leaving = _LayersAfter(pairs=self._pairs)
        self._run(nn.ModuleList(), leaving, input_ids, positions, batch, input_embeds)
        return _left(leaving)

    def layers(self, layers: LayerRange, positions: Any, batch: Any, hidden: Hidden) -> Hidden:
        leaving = _LayersAfter(pairs=self._pairs)
        self._go_on(layers, leaving, positions, batch, hidden)
        return _left(leaving)

    def finish(self, positions: Any, batch: Any, hidden: Hidden) -> Any:
        return self._go_on(LayerRange(0, 0), self._norm, positions, batch, hidden)

    def _go_on(self, layers: LayerRange, norm: Any, *arguments: Any) -> Any:
        positions, batch, hidden = arguments
        arrived, part = self._part(layers)
        # Some stacks scale in place what goes in as embeddings.
        embeds = hidden[0].clone() if self._pairs else hidden[0]
        arrived.hidden = hidden
        try:
            return self._run(part, norm, None, positions, batch, embeds)
        finally:
            arrived.hidden = None

    def _part(self, layers: LayerRange) -> tuple[_LayersBefore, nn.ModuleList]:
        if layers not in self._parts:
            arrived = _LayersBefore()
            before = [arrived] if self._pairs else []
            own = self._layers[layers.lo : layers.hi]
            self._parts[layers] = arrived, nn.ModuleList([*before, *own])
        return self._parts[layers]

    def _run(self, layers: Any, norm: Any, *arguments: Any) -> Any:
        stack = self._stack
        stack.layers, stack.norm = layers, norm
        try:
            return self._forward(*arguments)
        finally:
            stack.layers, stack.norm = self._layers, self._norm


def _left(leaving: _LayersAfter) -> Hidden:
    if leaving.left is None:
        raise ConfigurationError("it does not end with its norm")
    return leaving.left

"""Parts of a model are tried at launch, so that no drop finds out that they cannot be cut apart."""

from __future__ import annotations

from typing import Any

import torch

from kunserve_sglang.core.cost_model import Chunk, Work
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.instance.parts.engine import Hidden
from kunserve_sglang.instance.pipeline.profiling import probe
from kunserve_sglang.sglang_seam.model import LayeredDecoder
from kunserve_sglang.sglang_seam.stages import Stages, forward_batch_of, on_device

_TOKENS = 3
_ALIKE = 1e-2
"""Of the largest value: kernels may round otherwise the second time; a wrong cut is far off."""

_CANNOT = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What comes of asking a model for what it is not made for."""


@torch.no_grad()
def try_parts(
    decoder: LayeredDecoder, stages: Stages, device: torch.device, page_size: int = 1
) -> None:
    """Run a few tokens through all layers at once, and through the first and all others.

    To be called while all layers are here and no slot is taken; `page_size` slots are a block.
    Raises `ConfigurationError` unless both come to the same.
    """
    try:
        amiss = _amiss(decoder, stages, device, page_size)
    except (*_CANNOT, ConfigurationError) as error:
        raise ConfigurationError(
            f"{decoder.name}: KunServe cannot run it in parts: {str(error) or type(error).__name__}"
        ) from error
    if amiss:
        raise ConfigurationError(f"{decoder.name}: {amiss}; KunServe cannot run it in parts")


def _amiss(decoder: LayeredDecoder, stages: Stages, device: torch.device, page_size: int) -> str:
    batch, table = probe(Work(chunks=(Chunk(0, _TOKENS),)), page_size)
    there = on_device(batch, device)
    tokens = torch.arange(1, _TOKENS + 1, device=device)
    context = forward_batch_of(there, there.rows, there.out_slots, _TOKENS)
    context.input_ids = tokens

    def run(lo: int, hi: int, hidden: Hidden) -> Hidden:
        return stages.run(batch, table, 0, LayerRange(lo, hi), _copied(hidden))

    embedded = decoder.embed(tokens, there.positions, context, None)
    nothing = LayerRange(0, 0)
    if not _alike(embedded, decoder.layers(nothing, there.positions, context, _copied(embedded))):
        return "it changes what its layers take in when it goes on with it"
    last = decoder.layer_count
    whole = run(0, last, embedded)
    if not _alike(whole, run(1, last, run(0, 1, embedded))):
        return "its layers compute something else one by one than together"
    decoder.finish(there.positions, context, _copied(whole))
    stages.forget_owners()
    return ""


def _copied(hidden: Hidden) -> Hidden:
    """Layers may work in place."""
    return hidden[0].clone(), None if hidden[1] is None else hidden[1].clone()


def _alike(one: Hidden, other: Hidden) -> bool:
    return all(_close(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def _close(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    most = float(one.abs().max())
    return torch.allclose(one, other, rtol=0, atol=_ALIKE * most, equal_nan=True)

"""FlashAttention 3 with torch for its kernels, as SGLang's backend for it calls them.

What SGLang has planned for a batch shows in what comes out. The kernels' package need not be there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from sglang.srt.layers.attention import attention_registry

from tests.support.emulated_tensors import on_device
from tests.support.reference_flashinfer import attention, read

_HOPPER = (9, 0)


@contextmanager
def reference_flash_attention() -> Iterator[None]:
    """In here SGLang's backend finds these, and a GPU that they are for."""
    functions = {
        "flash_attn_with_kvcache": _with_kvcache,
        "flash_attn_varlen_func": None,
        "get_scheduler_metadata": _schedule,
    }
    modules = {
        "sgl_kernel": _module("sgl_kernel", merge_state_v2=None),
        "sgl_kernel.flash_attn": _module("sgl_kernel.flash_attn", **functions),
        "sglang.jit_kernel.flash_attention": _module("flash_attention", **functions),
    }
    with (
        patch.dict(sys.modules, modules),
        patch.object(attention_registry, "get_device_capability", lambda: _HOPPER),
    ):
        yield


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


def _with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    page_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    **_: Any,
) -> torch.Tensor:
    """Each request's queries `(tokens, heads, dim)` to its pages `(tokens, heads, dim)`."""
    for plan in (page_table, cache_seqlens, cu_seqlens_q):
        assert on_device(plan)
        assert plan.dtype is torch.int32
    results = []
    spans = pairwise(read(cu_seqlens_q))
    for row, length, (first, end) in zip(page_table, read(cache_seqlens), spans, strict=True):
        pages = row[: -(-length // k_cache.shape[1])].long()
        keys, values = (
            cache.index_select(0, pages).flatten(0, 1)[:length] for cache in (k_cache, v_cache)
        )
        results.append(attention(q[first:end], keys, values, softmax_scale, causal)[0])
    return torch.cat(results)


def _schedule(*, batch_size: int, **_: Any) -> torch.Tensor:
    """As large as the real one for decode steps."""
    return torch.zeros(1 + 4 * -(-batch_size // 4), dtype=torch.int32, device="cuda")

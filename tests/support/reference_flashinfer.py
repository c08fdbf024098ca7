"""FlashInfer's wrappers with torch for their kernels, as SGLang's backend for it calls them.

What SGLang has planned for a batch shows in what comes out. FlashInfer itself need not be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from sglang.srt.layers.attention import flashinfer_backend

from tests.support.emulated_tensors import on_device

_Result = tuple[torch.Tensor, torch.Tensor]
"""Outputs `(tokens, heads, dim)`, and for each the logarithm of the sum of its weights."""


@contextmanager
def reference_flashinfer() -> Iterator[None]:
    """In here SGLang's backend calls these."""
    stand_ins = {
        "BatchDecodeWithPagedKVCacheWrapper": _Decode,
        "BatchPrefillWithPagedKVCacheWrapper": _Paged,
        "BatchPrefillWithRaggedKVCacheWrapper": _Ragged,
        "fast_decode_plan": lambda wrapper, *args, **kwargs: wrapper.plan(*args, **kwargs),
        "should_use_tensor_core": lambda **_: False,
        "_safe_merge_state": _merged,
    }
    with ExitStack() as undo:
        for name, stand_in in stand_ins.items():
            undo.enter_context(patch.object(flashinfer_backend, name, stand_in, create=True))
        yield


class _Wrapper:
    """A plan, and runs by it. In graphs it lies in buffers of whoever made the wrapper."""

    def __init__(
        self,
        workspace: torch.Tensor,
        layout: str,
        *,
        backend: str,  # noqa: ARG002
        use_tensor_cores: bool = False,  # noqa: ARG002
        use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,  # noqa: ARG002
    ) -> None:
        assert on_device(workspace)
        assert layout == "NHD"
        self.is_cuda_graph_enabled = use_cuda_graph
        self._starts: Any = paged_kv_indptr_buffer
        self._paged_kv_indices_buf: Any = paged_kv_indices_buffer
        self._queries: Any = None
        self.begin_forward = self.plan

    def plan(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.forward_return_lse(*args, **kwargs)[0]

    def forward_return_lse(self, *_: Any, **__: Any) -> _Result:
        raise NotImplementedError

    def _attend(
        self, query: torch.Tensor, cache: Any, spans: list[range], scale: float, causal: bool
    ) -> _Result:
        """Each span of queries to what its request has in the cache."""
        results = []
        for span, (first, end) in zip(spans, pairwise(read(self._starts)), strict=False):
            rows = self._paged_kv_indices_buf[first:end].long()
            keys, values = (part.index_select(0, rows) for part in cache)
            results.append(attention(query[_slice(span)], keys, values, scale, causal))
        outputs, weights = zip(*results, strict=True)
        return torch.cat(outputs), torch.cat(weights)


class _Decode(_Wrapper):
    def plan(
        self,
        starts: torch.Tensor,
        indices: torch.Tensor,
        *_: Any,
        global_override_indptr_cpu: torch.Tensor | None = None,
        **__: Any,
    ) -> None:
        assert on_device(starts)
        assert on_device(indices)
        if global_override_indptr_cpu is not None:
            assert read(global_override_indptr_cpu) == read(starts)
        if self.is_cuda_graph_enabled:
            assert indices.data_ptr() == self._paged_kv_indices_buf.data_ptr()
            self._starts.copy_(starts)
        else:
            self._starts, self._paged_kv_indices_buf = starts.clone(), indices.clone()

    def forward_return_lse(
        self, query: torch.Tensor, cache: Any, *, sm_scale: float, **_: Any
    ) -> _Result:
        spans = [range(number, number + 1) for number in range(len(query))]
        return self._attend(query, cache, spans, sm_scale, causal=False)


class _Paged(_Wrapper):
    def plan(
        self, queries: torch.Tensor, starts: torch.Tensor, indices: torch.Tensor, *_: Any, **__: Any
    ) -> None:
        assert all(map(on_device, (queries, starts, indices)))
        self._queries, self._starts = queries.clone(), starts.clone()
        self._paged_kv_indices_buf = indices.clone()

    def forward_return_lse(
        self, query: torch.Tensor, cache: Any, *, causal: bool, sm_scale: float, **_: Any
    ) -> _Result:
        spans = [range(*pair) for pair in pairwise(read(self._queries))]
        return self._attend(query, cache, spans, sm_scale, causal)


class _Ragged(_Wrapper):
    def plan(self, queries: torch.Tensor, *_: Any, **__: Any) -> None:
        assert on_device(queries)
        self._queries = queries.clone()

    def forward_return_lse(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        causal: bool,
        sm_scale: float,
        **_: Any,
    ) -> _Result:
        results = []
        for pair in pairwise(read(self._queries)):
            own = _slice(range(*pair))
            results.append(attention(query[own], keys[own], values[own], sm_scale, causal))
        outputs, weights = zip(*results, strict=True)
        return torch.cat(outputs), torch.cat(weights)


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, causal: bool
) -> _Result:
    """Of the last `len(query)` tokens of a request to all in `keys`, which may be none."""
    shared = query.shape[1] // keys.shape[1]
    keys, values = (x.unsqueeze(2).expand(-1, -1, shared, -1).flatten(1, 2) for x in (keys, values))
    scores = scale * torch.einsum("qhd,khd->qhk", query, keys)
    if causal:
        last = torch.arange(len(query), device=query.device) + len(keys) - len(query)
        later = torch.arange(len(keys), device=query.device) > last[:, None]
        scores = scores.masked_fill(later[:, None], -torch.inf)
    return torch.einsum("qhk,khd->qhd", scores.softmax(-1), values), scores.logsumexp(-1)


def _merged(
    one: torch.Tensor, its_weights: torch.Tensor, other: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, None]:
    share = torch.sigmoid(its_weights - weights)[..., None]
    return share * one + (1 - share) * other, None


def read(integers: torch.Tensor) -> list[int]:
    """As a kernel reads them: nobody waits for the device."""
    with torch._C.DisableTorchFunction():
        values: list[int] = integers.tolist()
    return values


def _slice(span: range) -> slice:
    return slice(span.start, span.stop)

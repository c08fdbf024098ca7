"""Taking SGLang's batches apart, putting them together, and describing them to stages."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch

from kunserve_sglang.instance.parts.engine import StageBatch


def no_requests() -> Any:
    """An empty batch."""
    return ScheduleBatch(reqs=[], batch_is_full=False)


def merged(batch: Any, other: Any) -> Any:
    """One decode batch of both; neither may be used afterwards."""
    if batch.is_empty():
        return other
    if not other.is_empty():
        batch.merge_batch(other)
    return batch


def settled(running: Any, batch: Any, chunked: Any) -> Any:
    """The running batch, and what goes on of a batch whose results have been applied.

    Finished requests have left; a request with chunks still to come (`chunked`, or the batch's
    own at its time) does not decode yet.
    """
    unfinished = [r for r in (chunked, batch.chunked_req) if r is not None]
    batch.filter_batch(chunked_req_to_exclude=unfinished)
    whole = merged(running, batch)
    whole.chunked_req = None  # it will decode one day, perhaps in this very batch
    return whole


def split(batch: Any, size: int) -> tuple[Any, Any]:
    """A decode batch of the first `size` requests, and one of the others."""
    count = batch.batch_size()
    if size >= count:
        return batch, no_requests()
    rest = copy.copy(batch)
    rest.sampling_info = _copy_of_sampling(batch.sampling_info, rest)
    batch.filter_batch(keep_indices=list(range(size)))
    rest.filter_batch(keep_indices=list(range(size, count)))
    return batch, rest


def with_slots(batches: Iterable[Any], chunked: Any) -> list[Any]:
    """The requests in `batches` that hold token slots, and the one in chunks, each once."""
    found: dict[str, Any] = {}
    for batch in batches:
        for request in batch.reqs if batch is not None else ():
            if request.req_pool_idx is not None and not request.finished():
                found[request.rid] = request
    if chunked is not None:
        found[chunked.rid] = chunked
    return list(found.values())


def described(batch: Any, owner: int) -> StageBatch:
    """A scheduled batch as stages see it; its `out_slots` stay where they are.

    All else SGLang knows on the host: to copy it from a GPU would be to wait for the GPU.
    """
    seq_lens = batch.seq_lens_cpu
    prefix_lens = extend_lens = None
    if batch.forward_mode.is_extend():
        prefix_lens = torch.tensor(batch.prefix_lens, dtype=torch.int32)
        extend_lens = torch.tensor(batch.extend_lens, dtype=torch.int32)
        spans = zip(batch.prefix_lens, batch.extend_lens, strict=True)
        positions = torch.cat([torch.arange(first, first + tokens) for first, tokens in spans])
    else:
        positions = seq_lens - 1
    return StageBatch(
        owner=owner,
        rows=batch.req_pool_indices_cpu,
        seq_lens=seq_lens,
        positions=positions,
        out_slots=batch.out_cache_loc,
        prefix_lens=prefix_lens,
        extend_lens=extend_lens,
    )


def _copy_of_sampling(info: Any, batch: Any) -> Any:
    """Filtering replaces tensors and never writes to them, so that a shallow copy is enough."""
    info = copy.copy(info)
    orchestrator = copy.copy(info.penalizer_orchestrator)
    orchestrator.batch = batch
    orchestrator.penalizers = {
        kind: copy.copy(penalizer) for kind, penalizer in orchestrator.penalizers.items()
    }
    for penalizer in orchestrator.penalizers.values():
        penalizer._orchestrator_ref = weakref.ref(orchestrator)
    info.penalizer_orchestrator = orchestrator
    return info

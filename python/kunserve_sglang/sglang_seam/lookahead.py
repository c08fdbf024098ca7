"""SGLang's queues and batches as the work that batch formation reasons about."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from kunserve_sglang.core.cost_model import Chunk, Work
from kunserve_sglang.core.layout import in_blocks
from kunserve_sglang.execution.formation import Outlook, chunks_ahead
from kunserve_sglang.sglang_seam.scheduling import Scheduling
from kunserve_sglang.sglang_seam.waiting import WaitingRequests


def crowd_work(crowd: Any) -> Work:
    """One decode step of all running requests."""
    return Work(decodes=len(crowd.reqs), context=sum(r.seqlen for r in crowd.reqs))


def batch_work(batch: Any) -> Work:
    """A scheduled batch."""
    if batch.forward_mode.is_extend():
        pairs = zip(batch.prefix_lens, batch.extend_lens, strict=True)
        return Work(chunks=tuple(Chunk(prefix, tokens) for prefix, tokens in pairs))
    return Work(decodes=batch.batch_size(), context=int(batch.seq_lens_cpu.sum()))


def prompts_ahead(scheduler: Scheduling, waiting: WaitingRequests, chunks: int) -> list[Chunk]:
    """The next prefill work, at most `chunks` times what SGLang takes at once."""
    limit = scheduler.chunked_prefill_size or scheduler.max_prefill_tokens
    return chunks_ahead(_prompts_left(scheduler, waiting), limit=limit, count=chunks)


def _prompts_left(scheduler: Scheduling, waiting: WaitingRequests) -> Iterator[Chunk]:
    """Of the prompts that may come next, all that has not been computed.

    Cached prefixes of waiting requests are not looked up: that would cost a walk of the tree for
    each of them at each step.
    """
    chunked = scheduler.chunked_req
    if chunked is not None:
        done = chunked.extend_range.end
        yield Chunk(done, chunked.seqlen - done)
    if not scheduler.running_batch.batch_is_full:
        for request in filter(waiting.fits, scheduler.waiting_queue):
            yield Chunk(0, request.seqlen)


@contextlib.contextmanager
def chunks_of(scheduler: Scheduling, outlook: Outlook) -> Iterator[None]:
    """Let SGLang cut prompts into chunks no longer than the outlook says, in whole blocks.

    It begins no prompt with less than a block.
    """
    configured = scheduler.chunked_prefill_size
    if configured is not None:
        wanted = in_blocks(outlook.chunk_tokens, scheduler.page_size)
        scheduler.chunked_prefill_size = min(configured, wanted)
    try:
        yield
    finally:
        scheduler.chunked_prefill_size = configured

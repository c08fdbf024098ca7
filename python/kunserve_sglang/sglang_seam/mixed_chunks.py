"""Prefills that take a decode step along (`--enable-mixed-chunk`), while all layers are here.

In cooperation micro-batches are of one kind, as formed by `execution.formation`; then SGLang's
mixing rests. Three things that SGLang takes for granted do not hold here: that the decoding
requests have been in the step before, that their penalties have been counted, and that a decode
step takes one slot a request.
"""

from __future__ import annotations

from typing import Any

from kunserve_sglang.sglang_seam.scheduling import Scheduling


def decoding_along(scheduler: Scheduling, running: Any) -> list[Any]:
    """Let the next prefill take the decode step of the `running` batch along, or not.

    Returns the requests that decode then. With overlap scheduling tokens are counted for penalties
    where a step is all decode (`penalties.counted`).
    """
    running.enable_overlap = scheduler.enable_overlap  # it may come from the other loop
    wanted = scheduler.server_args.enable_mixed_chunk and scheduler.chunked_prefill_size is not None
    info = running.sampling_info
    penalized = info is not None and info.penalizer_orchestrator.is_required
    uncounted = scheduler.enable_overlap and penalized
    scheduler.is_mixed_chunk = wanted and not scheduler.cooperating and not uncounted
    return list(running.reqs) if scheduler.is_mixed_chunk else []


def reserve_blocks(_result: None, adder: Any, *_: Any, **__: Any) -> None:
    """After `PrefillAdder.__init__`, which counts one slot for each request that decodes along.

    One that begins a block needs all of it.
    """
    counted = adder.cur_rem_token_offset
    if counted and adder.page_size > 1:
        more = max(0, adder.running_batch.new_tokens_required_next_decode() - counted)
        adder.cur_rem_token_offset += more
        adder.rem_total_token_offset += more


def exact_prefixes(_result: None, batch: Any, running: Any) -> None:
    """After `ScheduleBatch.mix_with_running`: what lies before the token of each decoding request.

    SGLang tells it from the outputs, of which it takes one to be pending with overlap scheduling.
    None is for those that have just come back from cooperation, or have sat out a prefill.
    """
    count = len(running.reqs)
    before = (batch.seq_lens_cpu[-count:] - 1).tolist()
    batch.prefix_lens = [*batch.prefix_lens[:-count], *before]

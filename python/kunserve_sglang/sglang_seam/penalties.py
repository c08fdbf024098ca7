"""Penalties that count every token once, and in the step after the one that produced it.

SGLang counts a request's last token when it prepares a decode step. With overlap scheduling the
result of the step before has not been applied by then, so that it counts the token before the
last, and a token of the prompt at first. Here it counts the tokens that the step reads instead:
they are known where it runs. A request that was retracted begins with what it has produced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.sampling.penaltylib import BatchedPenalizerOrchestrator


def count_unless_overlapped(original: Callable[[Any], None], batch: Any) -> None:
    """Around `ScheduleBatch.cumulate_penalty_output_tokens`, part of preparing a decode step."""
    if not batch.enable_overlap:
        original(batch)


@contextlib.contextmanager
def counted(batch: Any) -> Iterator[None]:
    """Around an overlapped step, once its input is known: a decode step counts what it reads.

    The counterpart of `count_unless_overlapped`, on the stream that computes the step. SGLang adds
    the penalties up for such a step; the sums are of no use to others, and wrong for a batch that
    is not the same any more.
    """
    info = batch.sampling_info
    penalized = info is not None and info.penalizer_orchestrator.is_required
    if penalized and batch.forward_mode.is_decode():
        info.penalizer_orchestrator.cumulate_output_tokens(batch.input_ids)
    yield
    if penalized:
        info.acc_additive_penalties = info.acc_scaling_penalties = None


def count_earlier_outputs(_result: None, batch: Any) -> None:
    """After `ScheduleBatch.prepare_for_extend`: penalties of requests that were retracted."""
    orchestrator = batch.sampling_info.penalizer_orchestrator
    if orchestrator.is_required and any(request.output_ids for request in batch.reqs):
        batch.sampling_info.penalizer_orchestrator = _with_outputs(orchestrator, batch)


def additive_first(
    original: Callable[..., None], orchestrator: Any, logits: torch.Tensor, repeat: Any = None
) -> None:
    """Around `BatchedPenalizerOrchestrator.apply`: in the order in which overlapped steps do it.

    SGLang takes them in the order of a set, which differs from process to process.
    """
    if repeat is not None:  # speculative decoding, where SGLang has this order already
        original(orchestrator, logits, repeat)
        return
    penalizers = orchestrator.penalizers.values()
    for penalizer in sorted(penalizers, key=lambda each: each.is_multiplicative):
        penalizer.apply(logits)


def _with_outputs(fresh: Any, batch: Any) -> Any:
    """`fresh` with all output tokens counted; each request by itself, since they differ in number.

    Penalizers make their tensors for all requests of their batch when they are first needed, so the
    batch grows along.
    """
    together = ScheduleBatch(reqs=batch.reqs[:1], device=batch.device)
    whole = _counted_alone(fresh, together)
    for request in batch.reqs[1:]:
        alone = ScheduleBatch(reqs=[request], device=batch.device)  # penalizers do not keep it
        whole.merge(_counted_alone(fresh, alone))
        together.reqs = [*together.reqs, request]
    whole.batch = batch
    return whole


def _counted_alone(fresh: Any, batch: Any) -> Any:
    """Penalizers like `fresh` for a batch of one request, with all of its output counted."""
    counted = BatchedPenalizerOrchestrator(fresh.vocab_size, batch, set(fresh.penalizers))
    for token in batch.reqs[0].output_ids:
        counted.cumulate_output_tokens(torch.tensor([token], device=batch.device))
    return counted

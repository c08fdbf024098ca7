"""What a step costs besides the decoder layers: scheduling, embedding, head and sampling.

Plays requests on a scheduler without HTTP and compares the time of each step with what the cost
model says of its layers. Counts this thread's time, so that other programs matter less.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from kunserve_sglang.policy.cost_model import CostModel, Work
from kunserve_sglang.simulation.profile import StepCost

if TYPE_CHECKING:
    from kunserve_sglang.sglang_seam.scheduler import KunServeScheduler

_BATCHES = (1, 2, 4, 8, 16)
_PROMPT, _OUTPUT = 48, 12


class Step(msgspec.Struct, frozen=True):
    """A step of `work`, in milliseconds."""

    work: Work
    ms: float


def fit_step_cost(steps: Sequence[Step], model: CostModel, layers: int) -> StepCost:
    """What is left of the steps without their layers, by requests and by tokens.

    Medians of equal batches, so that a disturbed step counts little. Never negative.
    """
    rest: dict[tuple[int, int], list[float]] = {}
    for step in steps:
        work = step.work
        requests = work.decodes or len(work.chunks)
        tokens = work.decodes or sum(c.tokens for c in work.chunks)
        rest.setdefault((requests, tokens), []).append(step.ms - layers * model.predict(work))
    features = np.array([(1.0, requests, tokens) for requests, tokens in rest])
    times = np.array([float(np.median(values)) for values in rest.values()])
    kept = [0, 1, 2]
    while True:
        found, *_ = np.linalg.lstsq(features[:, kept], times, rcond=None)
        if found.min() >= 0 or len(kept) == 1:
            break
        kept.pop(int(found.argmin()))
    costs = np.zeros(3)
    costs[kept] = np.maximum(found, 0.0)
    return StepCost(fixed_ms=float(costs[0]), request_ms=float(costs[1]), token_ms=float(costs[2]))


def play(scheduler: KunServeScheduler) -> list[Step]:
    """Batches of several sizes from their prompts to their last tokens, one after the other."""
    steps: list[Step] = []
    for repeat in range(2):
        for count in _BATCHES:
            for number in range(count):
                # Prompts share no prefix, or the second batch would have less to do.
                first = 100 * (10 * count + number + 1000 * repeat)
                add(scheduler, f"{repeat}-{count}-{number}", range(first, first + _PROMPT), _OUTPUT)
            steps += _run(scheduler)
    return steps


def _run(scheduler: Any) -> list[Step]:
    """SGLang's loop without overlap, until nothing runs any more."""
    from kunserve_sglang.sglang_seam.lookahead import batch_work

    steps: list[Step] = []
    while True:
        started = time.thread_time()
        scheduler.process_input_requests([])
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
        scheduler.last_batch = batch
        if not batch:
            scheduler.on_idle()
            return steps
        work = batch_work(batch)
        scheduler.process_batch_result(batch, scheduler.run_batch(batch))
        steps.append(Step(work, 1e3 * (time.thread_time() - started)))


def add(scheduler: Any, rid: str, prompt: Iterable[int], new_tokens: int) -> None:
    """Queue a request as the tokenizer would; greedy, and exactly `new_tokens` long."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_new_tokens=new_tokens)
    sampling.normalize(None)
    vocabulary = scheduler.model_config.vocab_size
    values: dict[str, Any] = {
        "rid": rid,
        "input_text": "",
        "input_ids": array("q", (token % vocabulary for token in prompt)),
        "sampling_params": sampling,
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "stream": True,
        "time_stats": APIServerReqTimeStats(),
    }
    for field in msgspec.structs.fields(TokenizedGenerateReqInput):
        if field.required and field.name not in values:
            values[field.name] = None
    scheduler.handle_generate_request(TokenizedGenerateReqInput(**values))

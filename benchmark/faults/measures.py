"""What the times after a fault are measured by, and what the answers are without one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file

from benchmark.experiment import RunError
from benchmark.faults.cells import LoadKind
from benchmark.faults.load import Ask, Clients
from benchmark.faults.verdicts import Answer
from benchmark.prompts import PromptSource, load_tokenizer

LEAST_MARGIN = 2e-4
"""In nats. How kernels add up depends on the batch, by some 1e-5 of a logit in fp32."""

_ROUNDS = 5
_PREFILL_TOKENS = 96
"""About what a stream has when it is interrupted: a prompt and half of an answer."""


def reload_s(model: Path) -> float:
    """Median time to read all parameters from the checkpoint as float32."""
    took = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for file in sorted(model.glob("*.safetensors")):
            for tensor in load_file(file).values():
                tensor.to(torch.float32)
        took.append(time.perf_counter() - began)
    return median(took)


async def prefill_s(clients: Clients, model: Path) -> float:
    """Median time of a lone request for one token, with a prompt that nobody has cached."""
    source = PromptSource(load_tokenizer(model), seed=11)
    sampling = {"max_new_tokens": 1, "temperature": 0}
    took = []
    for _ in range(_ROUNDS):
        prompt = list(source.tokens(_PREFILL_TOKENS))
        (answer,) = await clients.all(
            [Ask("/generate", {"input_ids": prompt, "sampling_params": sampling})]
        )
        if not answer.whole:
            raise RunError(f"a lone request failed: {answer.error}")
        took.append(answer.ended - answer.sent)
    return median(took)


async def expected(
    clients: Clients, loads: Mapping[LoadKind, Sequence[Ask]]
) -> dict[LoadKind, list[tuple[object, ...]]]:
    """The answers without a fault; twice, and they have to be equal.

    Raises `RunError` where they are not, or may not be another time since two tokens are all but
    equally likely: then no other answer could be called wrong.
    """
    await _without_ties(clients, loads)
    return {kind: await _twice(clients, load) for kind, load in loads.items()}


async def _without_ties(clients: Clients, loads: Mapping[LoadKind, Sequence[Ask]]) -> None:
    for load in loads.values():
        greedy = [number for number, ask in enumerate(load) if not ask.drawn]
        margins = await asyncio.gather(*(clients.margin(load[n]) for n in greedy))
        for number, margin in zip(greedy, margins, strict=True):
            if margin < LEAST_MARGIN:
                raise RunError(f"request {number} has two answers that are all but equally likely")


async def _twice(clients: Clients, load: Sequence[Ask]) -> list[tuple[object, ...]]:
    await clients.all(load[:1])  # a common prefix is computed once
    first, second = [await clients.all(load) for _ in range(2)]
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        if not (one.whole and other.whole):
            raise RunError(f"request {number} failed without a fault: {one.error}{other.error}")
        if _plainly(one) != _plainly(other):
            raise RunError(f"request {number} has two answers without a fault")
    return [a.tokens for a in first]


def _plainly(answer: Answer) -> object:
    if answer.tokens and isinstance(answer.tokens[0], str):
        return "".join(map(str, answer.tokens))
    return answer.tokens

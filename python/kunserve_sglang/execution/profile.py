"""Which micro-batches `instance.pipeline.profiling` measures for the cost model, and how often.

A CPU computes from the first token on: a profile of small shapes says all. On a GPU launching
kernels and reading parameters take as long for one token as for a hundred, so that little is to be
learned there; what counts are chunks of thousands of tokens, contexts of tens of thousands, and
decode steps of as many requests as run together.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import msgspec

from kunserve_sglang.core.cost_model import Chunk, Work

_STEP = 4
"""Factor from one size to the next on a GPU; the fit interpolates between them."""

_MIN_CHUNK = 32
_MIN_CONTEXT = 64
_MIN_PREFIX = 1024
_MAX_RUNNING = 256
_LONGEST = 32_768
"""Longer ones take seconds to measure, and the fit knows all terms from shorter ones."""

_PROMPTS = (4, 16)
"""Prompts that share a micro-batch on a GPU."""


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How a shape is measured: `warmups` runs that do not count, then `repeats`.

    `budget_s` is the time for the whole profile. With `middle`, the median of the repeats counts,
    else the shortest.
    """

    warmups: int
    repeats: int
    middle: bool
    budget_s: float

    def of(self, times: Sequence[float]) -> float:
        """What counts of all runs, in the order in which they were made."""
        counted = times[self.warmups :]
        return statistics.median(counted) if self.middle else min(counted)


ON_HOST = Timing(warmups=1, repeats=3, middle=False, budget_s=20.0)
"""The minimum: other programs on the machine can only make a run longer."""

ON_DEVICE = Timing(warmups=2, repeats=5, middle=True, budget_s=10.0)
"""The median after warming up: clocks vary, and the first runs compile and choose kernels."""

UNHURRIED = msgspec.structs.replace(ON_HOST, budget_s=float("inf"))
"""On a CPU, all shapes however long it takes."""


def timing(device: str) -> Timing:
    """`device` is torch's word for the kind: `cpu`, `cuda`."""
    return ON_HOST if device == "cpu" else ON_DEVICE


def shapes(device: str, *, slots: int, context: int, chunk: int, running: int) -> list[Work]:
    """What is measured on such a device.

    As far as `slots` slots and requests of `context` tokens allow; `chunk` is the most tokens of a
    prefill, `running` the most requests of a decode step (on a CPU: whatever it is).
    """
    if device == "cpu":
        return list(_on_host(slots, context, chunk))
    return list(_on_device(slots, context, chunk, running))


def _on_host(slots: int, context: int, chunk: int) -> Iterator[Work]:
    for decodes in (1, 2, 4, 8, 16, 32, 64):
        for length in (16, 128, 512, 1024):
            if decodes * length <= slots and length <= context:
                yield Work(decodes=decodes, context=decodes * length)
    for tokens in sorted({16, 32, 64, min(128, chunk), min(256, chunk), min(512, chunk)}):
        for prefix in (0, 128, 512, 1024):
            if prefix + tokens <= min(slots, context):
                yield Work(chunks=(Chunk(prefix, tokens),))
    for many in (2, 4, 8):
        if many * 32 <= min(slots, chunk):
            yield Work(chunks=(Chunk(0, 32),) * many)


def _on_device(slots: int, context: int, chunk: int, running: int) -> Iterator[Work]:
    """The corners of what can come, and some sizes between."""
    for decodes in _sizes(1, min(running, slots, _MAX_RUNNING)):
        for length in _sizes(_MIN_CONTEXT, min(slots // decodes, context, _LONGEST)):
            yield Work(decodes=decodes, context=decodes * length)
    chunk = min(chunk, slots, context)
    for tokens in _sizes(_MIN_CHUNK, chunk):
        longest = min(slots, context, max(_LONGEST, chunk)) - tokens
        for prefix in (0, *_sizes(_MIN_PREFIX, longest)):
            yield Work(chunks=(Chunk(prefix, tokens),))
    for prompts in _PROMPTS:
        for tokens in _sizes(_MIN_CHUNK, chunk // prompts if prompts <= running else 0):
            yield Work(chunks=(Chunk(0, tokens),) * prompts)


def _sizes(least: int, most: int) -> list[int]:
    """From `least` on in steps, up to half of `most`, and `most` itself; `most` alone if less."""
    found = []
    while least <= most // 2:
        found.append(least)
        least *= _STEP
    return [*found, most] if most > 0 else []

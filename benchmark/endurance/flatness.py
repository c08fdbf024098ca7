"""Whether a figure grows: the slope of its samples, with its error. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

BLOCK_S = 20.0
"""Samples of so long are one: neighbours tell the same, and would make the error too small."""

_HOUR_S = 3600.0
_SURE = 2.0
"""Standard errors on either side that leave one true slope in twenty outside."""


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth in an hour, of a figure whose mean is `mean`; `error` is the standard error.

    `blocks` are what it was found from, and `lives` the processes that these are of.
    """

    per_hour: float
    error: float
    mean: float
    blocks: int
    lives: int

    @property
    def surely(self) -> float:
        """It grows by at least so much; 0 where that it grows at all may be chance."""
        return max(0.0, self.per_hour - _SURE * self.error)


def slope(
    lives: Mapping[Any, Sequence[tuple[float, float]]], warm_at: Callable[[float], float]
) -> Slope | None:
    """Of samples (seconds, value) by life, each of which has a level of its own.

    `warm_at` says from when on those of a life count that begins at a time: until then it takes
    what it needs at all. None if there is not enough to tell.
    """
    blocks = {life: _blocks(samples, warm_at) for life, samples in lives.items()}
    blocks = {life: means for life, means in blocks.items() if len(means) > 1}
    count = sum(map(len, blocks.values()))
    free = count - len(blocks) - 1
    if free < 2:
        return None
    at, value = (np.concatenate([_centred(m, i) for m in blocks.values()]) for i in (0, 1))
    spread = float(at @ at)
    rate = float(at @ value) / spread
    rest = value - rate * at
    error = math.sqrt(float(rest @ rest) / free / spread)
    mean = sum(v for means in blocks.values() for _, v in means) / count
    return Slope(rate * _HOUR_S, error * _HOUR_S, mean, count, len(blocks))


def _blocks(
    samples: Sequence[tuple[float, float]], warm_at: Callable[[float], float]
) -> list[tuple[float, float]]:
    if not samples:
        return []
    since = warm_at(samples[0][0])
    kept = [s for s in samples if s[0] >= since]
    return [_mean(block) for _, block in groupby(kept, key=lambda s: int((s[0] - since) / BLOCK_S))]


def _mean(block: Iterable[tuple[float, float]]) -> tuple[float, float]:
    times, values = zip(*block, strict=True)
    return sum(times) / len(times), sum(values) / len(values)


def _centred(means: Sequence[tuple[float, float]], index: int) -> np.ndarray:
    column = np.array([mean[index] for mean in means])
    centred: np.ndarray = column - column.mean()
    return centred

"""Predicted time of a micro-batch (paper section 4.4).

One prefill chunk of `c` tokens after a prefix of `p` tokens costs
`alpha * (p*c + c*(c+1)/2) + beta*c + gamma`; chunks that share a micro-batch load the parameters
only once, which saves `lambda` for each but the first. Beyond the paper: decode steps (by requests
and total context), the reading of the prefix's KV, and `waste * p*p` for attention kernels that
compute the whole square.

All of it is linear in the coefficients, so they are found by least squares. Times are milliseconds
of one decoder layer; a stage multiplies by its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from kunserve_sglang.core.bounds import Real
from kunserve_sglang.core.layout import largest

_LEARNING_RATE = 0.05
_SLOWEST_FACTOR, _FASTEST_FACTOR = 0.25, 4.0
"""Limits of measured to predicted time: what one run may say of the machine."""


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """`tokens` prompt tokens after `prefix` tokens whose KV exists."""

    prefix: int
    tokens: int


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What a micro-batch computes: prefill chunks, or one token each for `decodes` requests.

    `context` is the sum of the decoding requests' lengths.
    """

    chunks: tuple[Chunk, ...] = ()
    decodes: int = 0
    context: int = 0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """A measured micro-batch: milliseconds per decoder layer."""

    work: Work
    ms: float


class CostModel(msgspec.Struct, frozen=True, kw_only=True):
    """Fitted coefficients, each the milliseconds per layer of one feature.

    `prefill`: micro-batch (lambda), chunk (gamma - lambda), token (beta), attended pair (alpha),
    token of prefix, squared prefix (waste). `decode`: micro-batch, request, token of context.
    """

    prefill: tuple[Real, ...]
    decode: tuple[Real, ...]

    def predict(self, work: Work) -> float:
        """Milliseconds per layer."""
        ms = 0.0
        if work.chunks:
            # As `_prefill_features`, in one pass: this is asked at every step.
            tokens = pairs = prefixes = squares = 0.0
            for chunk in work.chunks:
                prefix, own = chunk.prefix, chunk.tokens
                tokens += own
                pairs += own * (prefix + (own + 1) / 2)
                prefixes += prefix
                squares += prefix * prefix
            batch, each, beta, alpha, rho, omega = self.prefill
            ms = batch + each * len(work.chunks) + beta * tokens
            ms += alpha * pairs + rho * prefixes + omega * squares
        if work.decodes:
            step, request, context = self.decode
            ms += step + request * work.decodes + context * work.context
        return ms

    def chunk_tokens(self, prefix: int, target_ms: float, most: int) -> int:
        """Tokens of a chunk that takes about `target_ms` per layer: at least 1, at most `most`."""

        def in_time(tokens: int) -> bool:
            return self.predict(Work(chunks=(Chunk(prefix, tokens),))) <= target_ms

        return max(1, largest(most, in_time))

    @property
    def decode_fixed_ms(self) -> float:
        """What another decode micro-batch costs before it holds any request."""
        return self.decode[0]

    @property
    def prefill_fixed_ms(self) -> float:
        """What another prefill chunk costs before it holds any token."""
        return self.prefill[0] + self.prefill[1]


class CostEstimate:
    """A cost model that follows the machine it runs on: a factor each for prefill and decode.

    A profile is taken once; clocks, neighbours and memory change. Factors move slowly, so that one
    disturbed run means little.
    """

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self._factors = {True: 1.0, False: 1.0}

    def predict(self, work: Work) -> float:
        """Milliseconds per layer."""
        return self.model.predict(work) * self._factors[bool(work.chunks)]

    def chunk_tokens(self, prefix: int, target_ms: float, most: int) -> int:
        """As `CostModel.chunk_tokens`."""
        return self.model.chunk_tokens(prefix, target_ms / self._factors[True], most)

    def fixed_ms(self, *, prefill: bool) -> float:
        """What another micro-batch costs per layer before it holds any token."""
        model = self.model
        fixed = model.prefill_fixed_ms if prefill else model.decode_fixed_ms
        return fixed * self._factors[prefill]

    def observe(self, work: Work, ms: float) -> None:
        """A run of `work` took `ms` per layer."""
        expected = self.model.predict(work)
        if expected <= 0:
            return
        kind = bool(work.chunks)
        ratio = min(max(ms / expected, _SLOWEST_FACTOR), _FASTEST_FACTOR)
        self._factors[kind] += _LEARNING_RATE * (ratio - self._factors[kind])


def fit(samples: Iterable[Sample]) -> CostModel:
    """Least squares on relative errors; coefficients are never negative.

    Raises `ValueError` if there are no samples of a kind.
    """
    prefill = [s for s in samples if s.work.chunks]
    decode = [s for s in samples if s.work.decodes]
    return CostModel(
        prefill=_fit([(_prefill_features(s.work.chunks), s.ms) for s in prefill]),
        decode=_fit([(_decode_features(s.work), s.ms) for s in decode]),
    )


def errors(model: CostModel, samples: Iterable[Sample]) -> list[float]:
    """Relative error of each prediction, unsigned."""
    return [abs(model.predict(s.work) - s.ms) / s.ms for s in samples]


def _prefill_features(chunks: Sequence[Chunk]) -> tuple[float, ...]:
    return (
        1.0,
        len(chunks),
        sum(c.tokens for c in chunks),
        sum(c.prefix * c.tokens + c.tokens * (c.tokens + 1) / 2 for c in chunks),
        sum(c.prefix for c in chunks),
        sum(c.prefix**2 for c in chunks),
    )


def _decode_features(work: Work) -> tuple[float, ...]:
    return (1.0, work.decodes, work.context)


def _fit(rows: Sequence[tuple[tuple[float, ...], float]]) -> tuple[float, ...]:
    """Non-negative least squares by dropping the most negative coefficient until none is left."""
    if not rows:
        raise ValueError("a cost model needs samples of prefill and of decode")
    # Imported here: only an instance that measures needs numpy, not the router or the command line.
    import numpy as np

    features = np.array([f for f, _ in rows])
    times = np.array([t for _, t in rows])
    weighted = features / times[:, None]
    kept = list(range(features.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(weighted[:, kept], np.ones(len(times)), rcond=None)
        if found.min() >= 0 or len(kept) == 1:
            break
        kept.pop(int(found.argmin()))
    coefficients = np.zeros(features.shape[1])
    coefficients[kept] = np.maximum(found, 0)
    return tuple(float(c) for c in coefficients)

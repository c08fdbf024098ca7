"""Measures what micro-batches cost on this machine, for the cost model of batch formation."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import torch

from kunserve_sglang.instance.engine import Engine, StageBatch
from kunserve_sglang.instance.ranked import clock_of
from kunserve_sglang.instance.ranks import Fact, OneRank, Ranks
from kunserve_sglang.layout import LayerRange
from kunserve_sglang.policy.cost_model import Chunk, CostModel, Sample, Work, fit

_LAYERS = 6
"""Decoder layers are alike: a few tell enough, in a fraction of the time."""

_REPEATS = 3

BUDGET_S = 20.0
"""Time for a profile; instances start no later than this because of it."""

_STRIDE = 5
_LEAST = 4
_PROBE_OWNER = -1

_ALONE = OneRank()
_MODEL: Fact[CostModel | None] = Fact("costs", msgspec.msgpack.Decoder(CostModel | None))


def shapes(slots: int, context: int, chunk: int) -> Iterator[Work]:
    """What is measured, as far as `slots` slots and requests of `context` tokens allow."""
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


def measure(
    engine: Engine, work: Iterable[Work], budget_s: float = BUDGET_S, ranks: Ranks = _ALONE
) -> list[Sample]:
    """Run shapes on this instance's own layers. To be called while all slots are free.

    A slow machine gets through a part of them in `budget_s`; it is spread over all, and has at
    least `_LEAST` of each kind. All ranks measure together, each its own time.
    """
    work = list(work)
    clock = clock_of(ranks)
    deadline = clock() + budget_s
    # Once over everything: the first touch of a page costs more than computing on it.
    batch, table = _probe(max(work, key=lambda w: w.context))
    everything = LayerRange(0, engine.layer_count)
    engine.forget_owners()
    engine.run_stage(batch, table, 0, everything, engine.blank_hidden(len(batch.positions)))
    samples: list[Sample] = []
    for shape in (w for start in range(_STRIDE) for w in work[start::_STRIDE]):
        kinds = Counter(bool(s.work.chunks) for s in samples)
        if clock() > deadline and min(kinds[True], kinds[False]) >= _LEAST:
            break
        samples.append(Sample(work=shape, ms=_measure(engine, shape)))
    return samples


def load_or_measure(
    engine: Engine, key: str, work: Iterable[Work], ranks: Ranks = _ALONE
) -> CostModel:
    """The cached model for `key`, or a new one. A cache that cannot be written is no error.

    All ranks get rank 0's.
    """
    path = _cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    known = ranks.agree(_MODEL, lambda: _read(path))
    if known is not None:
        return known
    mine = fit(measure(engine, work, ranks=ranks))
    if ranks.rank == 0:
        _write(path, mine)
    return ranks.agree(_MODEL, lambda: mine) or mine


def _read(path: Path) -> CostModel | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=CostModel)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _write(path: Path, model: CostModel) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_bytes(msgspec.json.encode(model))
        scratch.replace(path)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kunserve" / "profiles"


def _measure(engine: Engine, work: Work) -> float:
    """Milliseconds per layer; the first run, which compiles kernels, does not count.

    Each run takes other layers, so that neither parameters nor KV are still in a cache.
    """
    width = min(_LAYERS, engine.layer_count)
    windows = engine.layer_count // width
    batch, table = _probe(work)
    engine.forget_owners()
    hidden = engine.blank_hidden(len(batch.positions))
    times = []
    for repeat in range(1 + _REPEATS):
        first = repeat % windows * width
        layers = LayerRange(first, first + width)
        started = engine.clock()
        engine.run_stage(batch, table, 0, layers, hidden)
        times.append(engine.clock() - started)
    return 1e3 * min(times[1:]) / width  # whatever disturbs a run makes it longer


def _probe(work: Work) -> tuple[StageBatch, torch.Tensor]:
    """A batch of that shape on slots 1, 2, ..., and the request table that goes with it."""
    if work.decodes:
        length = max(1, work.context // work.decodes)
        spans = [Chunk(length - 1, 1)] * work.decodes
    else:
        spans = list(work.chunks)
    lengths = torch.tensor([s.prefix + s.tokens for s in spans])
    table = torch.zeros((len(spans), int(lengths.max())), dtype=torch.int32)
    positions, slots, first = [], [], 1
    for row, span in enumerate(spans):
        end = span.prefix + span.tokens
        table[row, :end] = torch.arange(first, first + end)
        positions.append(torch.arange(span.prefix, end))
        slots.append(torch.arange(first + span.prefix, first + end))
        first += end
    extend = not work.decodes
    batch = StageBatch(
        owner=_PROBE_OWNER,
        rows=torch.arange(len(spans)),
        seq_lens=lengths,
        positions=torch.cat(positions),
        out_slots=torch.cat(slots),
        prefix_lens=torch.tensor([s.prefix for s in spans]) if extend else None,
        extend_lens=torch.tensor([s.tokens for s in spans]) if extend else None,
    )
    return batch, table

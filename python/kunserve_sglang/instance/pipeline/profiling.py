"""Measures what micro-batches cost on this machine, for the cost model of batch formation."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import torch

from kunserve_sglang.core.cost_model import Chunk, CostModel, Sample, Work, fit
from kunserve_sglang.core.layout import LayerRange, in_blocks
from kunserve_sglang.execution.profile import ON_HOST, Timing
from kunserve_sglang.instance.parts.engine import Engine, StageBatch
from kunserve_sglang.instance.ranks.ranked import clock_of
from kunserve_sglang.instance.ranks.ranks import Fact, OneRank, Ranks

_LAYERS = 6
"""Decoder layers are alike: a few tell enough, in a fraction of the time."""

_STRIDE = 5
_LEAST = 4
_PROBE_OWNER = -1

_ALONE = OneRank()
_MODEL: Fact[CostModel | None] = Fact("costs", msgspec.msgpack.Decoder(CostModel | None))


def measure(
    engine: Engine,
    work: Iterable[Work],
    timing: Timing = ON_HOST,
    ranks: Ranks = _ALONE,
    block_slots: int = 1,
) -> list[Sample]:
    """Run shapes on this instance's own layers. To be called while all slots are free.

    A slow machine gets through a part of them in `timing.budget_s`; it is spread over all, and has
    at least `_LEAST` of each kind. All ranks measure together, each its own time. `block_slots` are
    handed out together.
    """
    work = list(work)
    clock = clock_of(ranks)
    deadline = clock() + timing.budget_s
    # Once over everything: the first touch of a page costs more than computing on it.
    batch, table = probe(max(work, key=lambda w: w.context), block_slots)
    everything = LayerRange(0, engine.layer_count)
    engine.forget_owners()
    engine.run_stage(batch, table, 0, everything, engine.blank_hidden(len(batch.positions)))
    samples: list[Sample] = []
    for shape in (w for start in range(_STRIDE) for w in work[start::_STRIDE]):
        kinds = Counter(bool(s.work.chunks) for s in samples)
        if clock() > deadline and min(kinds[True], kinds[False]) >= _LEAST:
            break
        samples.append(Sample(work=shape, ms=_measure(engine, shape, timing, block_slots)))
    return samples


def load_or_measure(
    engine: Engine,
    key: str,
    work: Iterable[Work],
    timing: Timing = ON_HOST,
    ranks: Ranks = _ALONE,
    block_slots: int = 1,
) -> CostModel:
    """The cached model for `key`, or a new one. A cache that cannot be written is no error.

    All ranks get rank 0's.
    """
    path = _cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    known = ranks.agree(_MODEL, lambda: _read(path))
    if known is not None:
        return known
    mine = fit(measure(engine, work, timing, ranks, block_slots))
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


def _measure(engine: Engine, work: Work, timing: Timing, block_slots: int) -> float:
    """Milliseconds per layer."""
    batch, table = probe(work, block_slots)
    engine.forget_owners()
    hidden = engine.blank_hidden(len(batch.positions))
    # What graphs exist for is going to run by graph.
    ranges = engine.captured(batch) or _windows(engine.layer_count)
    times = []
    for run in range(timing.warmups + timing.repeats):
        layers = ranges[run % len(ranges)]
        started = engine.clock()
        engine.run_stage(batch, table, 0, layers, hidden)
        times.append((engine.clock() - started) / len(layers))
    return 1e3 * timing.of(times)


def _windows(layers: int) -> Sequence[LayerRange]:
    """Each run takes other layers, so that neither parameters nor KV are still in a cache."""
    width = min(_LAYERS, layers)
    return [LayerRange(n * width, (n + 1) * width) for n in range(layers // width)]


def probe(work: Work, block_slots: int = 1) -> tuple[StageBatch, torch.Tensor]:
    """A batch of that shape on the first slots, and the request table that goes with it.

    Each request begins a block.
    """
    spans = _requests(work)
    lengths = torch.tensor([s.prefix + s.tokens for s in spans])
    table = torch.zeros((len(spans), int(lengths.max())), dtype=torch.int32)
    positions, slots, first = [], [], block_slots
    for row, span in enumerate(spans):
        end = span.prefix + span.tokens
        table[row, :end] = torch.arange(first, first + end)
        positions.append(torch.arange(span.prefix, end))
        slots.append(torch.arange(first + span.prefix, first + end))
        first += in_blocks(end, block_slots)
    extend = not work.decodes
    batch = StageBatch(
        owner=_PROBE_OWNER,
        rows=torch.arange(len(spans)),
        seq_lens=lengths,
        positions=torch.cat(positions),
        out_slots=torch.cat(slots),
        prefix_lens=torch.tensor([s.prefix for s in spans], dtype=torch.int32) if extend else None,
        extend_lens=torch.tensor([s.tokens for s in spans], dtype=torch.int32) if extend else None,
    )
    return batch, table


def slots_needed(work: Work, block_slots: int) -> int:
    """Slots of the blocks that `probe` takes for such work."""
    ends = (s.prefix + s.tokens for s in _requests(work))
    return sum(in_blocks(end, block_slots) for end in ends)


def _requests(work: Work) -> list[Chunk]:
    if not work.decodes:
        return list(work.chunks)
    length = max(1, work.context // work.decodes)
    return [Chunk(length - 1, 1)] * work.decodes

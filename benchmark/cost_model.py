"""Predicted against measured time of micro-batches, on shapes that the model was not fitted on.

`python -m benchmark.cost_model` loads the model into one scheduler on one core, takes the profile
that an instance takes at its start, fits the cost model on it, and then measures other shapes.
Beside it stands a model that knows tokens only, fitted on the same samples: what attention adds.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmark.cost_picture import draw
from benchmark.noise import Noise
from benchmark.program import ROOT, flags_of, run_program, small_model
from benchmark.report import describe_machine, dumps
from kunserve_sglang.core.cost_model import Chunk, CostModel, Sample, Work, errors, fit
from kunserve_sglang.core.sizes import parse_size
from kunserve_sglang.execution.profile import UNHURRIED
from kunserve_sglang.testing.local_scheduler import local_scheduler

MEDIAN_BAR = 0.05
"""Largest median error, relative, of the cost model (paper section 4.4: below 5 %)."""


def unseen_shapes(seen: Sequence[Work], slots: int, context: int, chunk: int) -> list[Work]:
    """Shapes between, beside and beyond those of the profile, none of them in it.

    Single chunks of odd lengths after odd prefixes, several chunks of different prompts in one
    micro-batch, and decode steps of other numbers of requests and lengths.
    """
    found = [
        Work(decodes=decodes, context=decodes * length)
        for decodes in (1, 3, 6, 12, 24, 48)
        for length in (40, 230, 700)
    ]
    found += [
        Work(chunks=(Chunk(prefix, tokens),))
        for tokens in (24, 48, 100, 180, 350)
        for prefix in (0, 60, 300, 800)
    ]
    several = (
        ((0, 20), (0, 90)),
        ((0, 50), (0, 50), (0, 50), (0, 50)),
        ((400, 60), (0, 120)),
        ((900, 30), (0, 40), (0, 40)),
        ((200, 150), (50, 70), (0, 30)),
        ((600, 20), (600, 20), (600, 20), (600, 20)),
        ((0, 200), (100, 80), (300, 40)),
        ((0, 16),) * 10,
    )
    found += [Work(chunks=tuple(Chunk(*pair) for pair in pairs)) for pairs in several]
    known = set(map(repr, seen))
    return [w for w in found if _fits(w, slots, context, chunk) and repr(w) not in known]


def _fits(work: Work, slots: int, context: int, chunk: int) -> bool:
    if work.decodes:
        return work.context <= slots and work.context <= work.decodes * context
    return (
        sum(c.tokens for c in work.chunks) <= chunk
        and sum(c.prefix + c.tokens for c in work.chunks) <= slots
        and all(c.prefix + c.tokens <= context for c in work.chunks)
    )


def best_of(passes: Iterable[Sequence[Sample]]) -> list[Sample]:
    """The shortest time of each shape: whatever disturbs a run makes it longer."""
    best: dict[str, Sample] = {}
    for sample in (s for samples in passes for s in samples):
        known = best.get(repr(sample.work))
        if known is None or sample.ms < known.ms:
            best[repr(sample.work)] = sample
    return list(best.values())


def fit_tokens_only(samples: Iterable[Sample]) -> CostModel:
    """`beta * tokens + gamma` for each kind of micro-batch: blind to prefixes and contexts."""
    samples = list(samples)
    beta, gamma = _line([s for s in samples if s.work.chunks])
    per_request, step = _line([s for s in samples if s.work.decodes])
    return CostModel(prefill=(gamma, 0.0, beta, 0.0, 0.0, 0.0), decode=(step, per_request, 0.0))


def _line(samples: Sequence[Sample]) -> tuple[float, float]:
    """Slope and constant by least squares on relative errors, as the cost model's own fit."""
    times = np.array([s.ms for s in samples])
    rows = np.array([(_tokens(s.work), 1.0) for s in samples])
    found, *_ = np.linalg.lstsq(rows / times[:, None], np.ones(len(times)), rcond=None)
    return float(found[0]), float(found[1])


def _tokens(work: Work) -> int:
    return work.decodes + sum(c.tokens for c in work.chunks)


def results(model: CostModel, blind: CostModel, unseen: Sequence[Sample]) -> dict[str, Any]:
    """Rows and checks; times are milliseconds of one decoder layer, errors are relative."""
    rows = [
        {
            "shape": describe(s.work),
            "kind": "decode" if s.work.decodes else "prefill",
            "predicted_ms": model.predict(s.work),
            "tokens_only_ms": blind.predict(s.work),
            "measured_ms": s.ms,
            "error": error,
            "tokens_only_error": blind_error,
        }
        for s, error, blind_error in zip(
            unseen, errors(model, unseen), errors(blind, unseen), strict=True
        )
    ]
    value = statistics.median(float(row["error"]) for row in rows)
    return {
        "rows": rows,
        "checks": [
            {
                "name": "median error on shapes that were not fitted",
                "value": value,
                "bar": MEDIAN_BAR,
                "ok": value <= MEDIAN_BAR,
            }
        ],
        "summary": {
            "cost_model": _spreads(rows, "error"),
            "tokens_only": _spreads(rows, "tokens_only_error"),
        },
        "coefficients": {
            "cost_model": {"prefill": model.prefill, "decode": model.decode},
            "tokens_only": {"prefill": blind.prefill, "decode": blind.decode},
        },
    }


def describe(work: Work) -> str:
    """`24 tokens after 300 + 50`, or `6 decodes of 230`."""
    if work.decodes:
        return f"{work.decodes} decodes of {work.context // work.decodes}"
    pieces = Counter(
        f"{c.tokens} after {c.prefix}" if c.prefix else f"{c.tokens}" for c in work.chunks
    )
    return " + ".join(f"{n} x {piece}" if n > 1 else piece for piece, n in pieces.items())


def _spreads(rows: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Median, 90th percentile and largest error over all rows and over each kind."""
    kinds = {"all": ("prefill", "decode"), "prefill": ("prefill",), "decode": ("decode",)}
    return {name: _spread([r[key] for r in rows if r["kind"] in of]) for name, of in kinds.items()}


def _spread(values: Sequence[float]) -> dict[str, float]:
    p50, p90, most = np.percentile(values, (50, 90, 100))
    return {"median": float(p50), "p90": float(p90), "max": float(most)}


def table(figures: dict[str, Any]) -> Table:
    """The summary on one screen."""
    grid = Table(title="Error of the predicted time", title_justify="left")
    grid.add_column("")
    for name in ("median", "P90", "largest"):
        grid.add_column(name, justify="right")
    for model, spreads in figures["summary"].items():
        for kind, spread in spreads.items():
            values = (f"{spread[key]:.1%}" for key in ("median", "p90", "max"))
            grid.add_row(f"{model.replace('_', ' ')}, {kind}", *values)
        grid.add_section()
    return grid


def measured(flags: argparse.Namespace, model: Path, console: Console) -> dict[str, Any]:
    """Load the model, measure, fit, and measure what the fit has not seen."""
    # Importing torch takes seconds; `--help` and the tests of the pure parts do without.
    import torch

    from kunserve_sglang.instance.pipeline.profiling import measure
    from kunserve_sglang.sglang_seam.assembly import shapes_for

    chunk = flags.chunked_prefill_size
    with local_scheduler(
        model,
        memory_budget=parse_size(flags.memory_budget),
        core=flags.core,
        chunked_prefill_size=chunk,
    ) as scheduler:
        slots, context = scheduler.max_total_num_tokens, scheduler.model_config.context_len
        seen = shapes_for(scheduler)
        unseen = unseen_shapes(seen, slots, context, chunk)
        profiles: list[list[Sample]] = []
        others: list[list[Sample]] = []
        noise = Noise()
        with Progress(console=console) as bar, torch.inference_mode():
            task = bar.add_task("measuring", total=2 * flags.passes)
            for _ in range(flags.passes):
                for work, found in ((seen, profiles), (unseen, others)):
                    found.append(measure(scheduler.engine, work, UNHURRIED))
                    bar.advance(task)
        share = noise.share()
    samples = best_of(profiles)
    figures = results(fit(samples), fit_tokens_only(samples), best_of(others))
    return {
        **figures,
        "fitted_on": len(samples),
        "passes": flags.passes,
        "noise": share,
        "model": model.name,
        "threads": 1,
        "chunked_prefill_size": chunk,
        "machine": describe_machine(),
    }


def parser() -> argparse.ArgumentParser:
    flags = flags_of(
        "cost_model", "Predicted against measured time of micro-batches, on this machine."
    )
    flags.add_argument("--model-path", type=Path, help="a model folder (default: a small one)")
    flags.add_argument("--memory-budget", default="1GiB", help="parameters + KV")
    flags.add_argument("--chunked-prefill-size", type=int, default=512)
    flags.add_argument("--core", type=int, default=0, help="the core to run on")
    flags.add_argument("--passes", type=int, default=3, help="runs; the best counts")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    return flags


def main() -> NoReturn:
    """Exit status 0 if the check holds."""
    flags = parser().parse_args()
    run_program("cost_model", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    model = flags.model_path or small_model()
    figures = measured(flags, model, console)
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "cost_model.json").write_text(dumps(figures))
    draw(figures, flags.output / "cost_model.png")
    console.print(table(figures))
    console.print(f"Other programs took {figures['noise']:.0%} of the cores meanwhile.")
    console.print(f"Written: cost_model.json and cost_model.png in {flags.output}")
    return 0 if all(check["ok"] for check in figures["checks"]) else 1


if __name__ == "__main__":
    main()

"""What each part of KunServe is worth, and whether it keeps its promises.

`python -m benchmark.ablation` runs the same requests on upstream SGLang and on KunServe with one
feature more each time (`benchmark.variants`), then a section for each further promise. It prints
tables and writes `ablation.json` and `ablation.png`; exit status 1 if a check fails.

The requests are twelve seconds of the Azure 2023 conversation trace, from 19:50 on, with a burst in
them. Time is stretched six times, prompts are cut to 0.06 and answers to 0.6 of their length, so
that a small model on two cores can compute them, and the burst needs more KV than two instances
have before a drop and less than they have after it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from benchmark import balanced, elastic, exchange, micro_batches, steady, transitions, variants
from benchmark.ablation_report import draw, row_table
from benchmark.bench import NUM_INSTANCES, Bench
from benchmark.checks import Section, at_most, check_table, failed, merge
from benchmark.experiment import RunError
from benchmark.program import ROOT, SGLANG_FLAGS, run_program, small_model
from benchmark.prompts import PromptSource, load_tokenizer
from benchmark.report import describe_machine, dumps

ROWS = "rows"
_COST_MODEL_BAR = 0.05


def cost_model(bench: Bench) -> Section:
    """Point 5, measured by `benchmark.cost_model`; a check that fails until that has been run."""
    path = bench.output / "cost_model.json"
    found = _read(path).get("checks", [])
    value = found[0]["value"] if found else float("nan")
    check = at_most(5, "cost model: median error on unseen shapes", value, _COST_MODEL_BAR)
    return Section({"measured": bool(found), "file": path.name}, (check,))


SECTIONS: dict[str, Callable[[Bench], Section]] = {
    "steady": steady.measure,
    "balanced": balanced.measure,
    "micro-batches": micro_batches.measure,
    "exchange": exchange.measure,
    "transitions": transitions.measure,
    "elastic": elastic.measure,
    "cost-model": cost_model,
}


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="python -m benchmark.ablation",
        description="KunServe against upstream SGLang, feature by feature, on this machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flags.add_argument("--model-path", type=Path, help="a model folder (default: a small one)")
    flags.add_argument(
        "--trace",
        type=Path,
        default=ROOT.parent / "shared" / "traces" / "azure_llm_2023_conv.csv",
        help="the Azure 2023 conversation trace, as its publishers have it",
    )
    flags.add_argument("--memory-budget", default="288MiB", help="parameters + KV an instance")
    flags.add_argument("--oracle-budget", default="544MiB", help="one that never overflows")
    flags.add_argument("--only", type=_sections, help=f"of {','.join((ROWS, *SECTIONS))}")
    flags.add_argument("--repeat", type=_positive, default=5, help="rounds of a median")
    flags.add_argument("--seed", type=int, default=1, help="of the prompts")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    return flags


def main() -> NoReturn:
    flags = parser().parse_args()
    run_program("ablation", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    """Measure what was asked for, one section after the other; returns the exit status.

    Results are written after each section, so that none is lost with a later one.
    """
    wanted: Sequence[str] = flags.only or (ROWS, *SECTIONS)
    if ROWS in wanted and not flags.trace.is_file():
        raise RunError(f"there is no trace {flags.trace}; use --trace, or --only without {ROWS}")
    model = flags.model_path or small_model()
    bench = Bench(
        model_path=model,
        memory_budget=flags.memory_budget,
        trace=flags.trace,
        prompts=PromptSource(load_tokenizer(model), flags.seed),
        repeat=flags.repeat,
        seed=flags.seed,
        output=flags.output,
        console=console,
    )
    path = flags.output / "ablation.json"
    results = _read(path)
    about = {"machine": describe_machine(), "setup": _setup(flags, model)}
    for name in wanted:
        section = _rows(bench, flags) if name == ROWS else SECTIONS[name](bench)
        results = merge(results, {name: section}, about)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dumps(results))
    if results["rows"]:
        console.print(row_table(results["rows"]))
    console.print(check_table(results["checks"]))
    console.print(f"Written: {path}")
    return 1 if failed(results["checks"]) else 0


def _rows(bench: Bench, flags: argparse.Namespace) -> Section:
    measured = variants.measure(bench, flags.oracle_budget)
    section = measured.section()
    draw(measured, section.figures["rows"], bench.output / "ablation.png")
    (bench.output / "ablation-raw.json").write_text(dumps(variants.raw(measured), indent=None))
    return section


def _setup(flags: argparse.Namespace, model: Path) -> dict[str, Any]:
    return {
        "model": model.name,
        "instances": NUM_INSTANCES,
        "memory_budget": flags.memory_budget,
        "oracle_budget": flags.oracle_budget,
        "sglang_flags": list(SGLANG_FLAGS),
        "repeat": flags.repeat,
        "seed": flags.seed,
        "workload": variants.describe_window(flags.trace),
        "variants": {v.name: list(v.flags) for v in variants.VARIANTS},
    }


def _read(path: Path) -> dict[str, Any]:
    """Results so far; empty if there are none. Raises `RunError` for a file that is no JSON."""
    if not path.is_file():
        return {}
    try:
        results: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is no JSON, and is not overwritten: {error}") from error
    return results


def _sections(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [n for n in names if n not in (ROWS, *SECTIONS)]:
        raise argparse.ArgumentTypeError(f"no section {unknown[0]!r}")
    return names


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


if __name__ == "__main__":
    main()

"""`python -m benchmark.hostile` writes `hostile.json`; exit status 0 if every check holds."""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
from pathlib import Path
from typing import NoReturn

import uvloop
from rich.console import Console

from benchmark.checks import conclude
from benchmark.hostile.parts import PARTS, Row, Sizes, checks_of
from benchmark.program import ROOT, flags_of, run_program
from benchmark.report import describe_machine


def parser() -> argparse.ArgumentParser:
    sizes = Sizes()
    flags = flags_of("hostile", "What strangers and broken instances can do to a router.")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    for name in Sizes.__dataclass_fields__:
        default = getattr(sizes, name)
        flags.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return flags


def main() -> NoReturn:
    flags = parser().parse_args()
    run_program("hostile", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    _raise_file_limit()
    sizes = Sizes(**{name: getattr(flags, name) for name in Sizes.__dataclass_fields__})
    rows: list[Row] = []
    for name in flags.parts:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            row = {"part": name, **runner.run(PARTS[name](sizes, flags.seed))}
        rows.append(row)
        console.print(json.dumps(row, indent=1), markup=False, soft_wrap=True)
    checks = checks_of(rows)
    results = {
        "command": "python -m benchmark.hostile",
        "machine": describe_machine(),
        "seed": flags.seed,
        "rows": rows,
        "checks": checks,
    }
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "hostile.json").write_text(json.dumps(results, indent=1) + "\n")
    return conclude(checks, console)


def _raise_file_limit() -> None:
    """Every client and every connection behind the router takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()

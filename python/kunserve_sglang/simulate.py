"""The door to the simulator: `python -m kunserve_sglang.simulate --profile ... --trace ...`.

Answers how many instances a load needs, and what dropping would save, without any instance.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kunserve_sglang.core.choices import OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.flags import add_flags, read_flags

try:
    from kunserve_sglang.simulation import Profile, SimulatedCluster, SimulationResult, load_profile
    from kunserve_sglang.simulation.report import Slo, counted, table, to_json
    from kunserve_sglang.simulation.traces import TraceRow, load_trace, multiply, scale, window
except ModuleNotFoundError as missing:  # on a host with a router alone, say
    sys.exit(f"kunserve: this needs {missing.name}: pip install 'kunserve-sglang[simulate]'")

CLUSTER_FLAGS = (
    *("drop_threshold", "restore_threshold", "max_group_size", "slo_ttft_ms", "slo_tpot_ms"),
    *("tpot_limit_ms", "exchange", "micro_batches", "dispatch"),
)
"""The settings of a cluster that make a difference here."""


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="python -m kunserve_sglang.simulate",
        description="How many instances a load needs, and what dropping parameters would save.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flags.add_argument(
        "--profile", type=Path, required=True, help="machine and model: a name, or TOML or JSON"
    )
    flags.add_argument("--trace", type=Path, required=True, help="Azure, BurstGPT or Mooncake")
    flags.add_argument("--instances", type=_counts, default=(2,), help="for example 4 or 2,4,8")
    flags.add_argument("--compare", type=_policies, default=("none", "drop"), help="policies")
    flags.add_argument("--slo-ttft", type=float, help="seconds to the first token at most")
    flags.add_argument(
        "--slo-attainment", type=float, default=0.99, help="share of requests within the SLO"
    )
    flags.add_argument("--output", type=Path, help="folder for simulation.json and .png")
    load = flags.add_argument_group("the load")
    load.add_argument("--start", type=float, default=0.0, help="skip so many seconds of the trace")
    load.add_argument("--duration", type=float, help="seconds of the trace (default: all)")
    load.add_argument("--rate-scale", type=float, default=1.0, help="times as many requests")
    load.add_argument("--prompt-scale", type=float, default=1.0, help="prompts so much longer")
    load.add_argument("--output-scale", type=float, default=1.0, help="outputs so much longer")
    load.add_argument("--max-total", type=int, help="cut requests longer than so many tokens")
    load.add_argument("--seed", type=int, default=1, help="of --rate-scale")
    cluster = flags.add_argument_group("the cluster, as in launch_server")
    add_flags(cluster, [ClusterConfig], only=CLUSTER_FLAGS)
    cluster.add_argument(
        "--watch-interval",
        type=float,
        help="seconds between two looks of the monitor (default: the router's, longer for many)",
    )
    return flags


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit status 0 when all runs came to their end, 2 for bad input."""
    flags = parser().parse_args(arguments)
    console = Console()
    try:
        run(flags, console)
    except ConfigurationError as error:
        Console(stderr=True).print(f"simulate: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def run(flags: argparse.Namespace, console: Console) -> None:
    """All runs of the sweep, the table, and the files if they are asked for."""
    profile = load_profile(flags.profile)
    rows = requests(flags)
    cluster = read_flags(flags, ClusterConfig, only=CLUSTER_FLAGS)
    slo = None
    if flags.slo_ttft is not None:
        slo = Slo(ttft_s=flags.slo_ttft, attainment=flags.slo_attainment)
    console.print(
        f"{len(rows):,} requests in {rows[-1].arrival_s:,.0f} s on {profile.name} "
        f"({profile.source})"
    )
    results = [
        simulate(
            profile,
            msgspec.structs.replace(
                cluster, num_instances=count, overload_policy=OverloadPolicy(policy)
            ),
            rows,
            flags,
            console,
        )
        for count, policy in itertools.product(flags.instances, flags.compare)
    ]
    setup = {
        "profile": profile.name,
        "source": profile.source,
        "trace": flags.trace.name,
        "requests": len(rows),
        **{
            name: getattr(flags, name)
            for name in (
                *("start", "duration", "rate_scale", "prompt_scale", "output_scale", "max_total"),
                "seed",
            )
        },
        **{name: getattr(cluster, name) for name in CLUSTER_FLAGS},
    }
    figures = to_json(results, slo, setup)
    console.print(table(figures))
    if flags.output is not None:
        _write(figures, results, slo, flags.output, console)


def requests(flags: argparse.Namespace) -> list[TraceRow]:
    """The load that the flags ask for; raises `ConfigurationError` if there is none."""
    try:
        rows = load_trace(flags.trace)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"{flags.trace}: {error}") from error
    rows = window(rows, flags.start, flags.duration or float("inf"))
    rows = scale(
        rows, prompt=flags.prompt_scale, output=flags.output_scale, max_total=flags.max_total
    )
    if flags.rate_scale != 1.0:
        rows = multiply(rows, flags.rate_scale, seed=flags.seed)
    if not rows:
        raise ConfigurationError(f"{flags.trace}: no requests in that part of the trace")
    return rows


def simulate(
    profile: Profile,
    config: ClusterConfig,
    rows: Sequence[TraceRow],
    flags: argparse.Namespace,
    console: Console,
) -> SimulationResult:
    """One run, with a progress bar on a terminal."""
    cluster = SimulatedCluster(profile, config, watch_interval_s=flags.watch_interval)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %  {task.fields[at]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        refresh_per_second=4,
    ) as bars:
        name = f"{counted(config.num_instances)}, {config.overload_policy}"
        task = bars.add_task(name, total=len(rows), at="")

        def progress(finished: int, now: float) -> None:
            bars.update(task, completed=finished, at=f"at {now:,.0f} s")

        return cluster.run(rows, progress)


def _write(
    figures: dict[str, object],
    results: Sequence[SimulationResult],
    slo: Slo | None,
    folder: Path,
    console: Console,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "simulation.json").write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    try:
        from kunserve_sglang.simulation.picture import draw
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"a picture needs {error.name}: pip install it") from error
    draw(results, slo, folder / "simulation.png")
    console.print(f"Written: simulation.json and simulation.png in {folder}")


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("instances must be at least 1")
    return counts


def _policies(text: str) -> tuple[str, ...]:
    try:
        return tuple(OverloadPolicy(part).value for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    main()

"""Measures a profile for `kunserve_sglang.simulate` on this machine.

`python -m benchmark.simulator_profile --output profile.toml` starts two instances, for what
surrounds the layers: the rest of a step, frontends, the way of a request. Then it loads the model
into one scheduler on one core and takes the profile of the layers that an instance takes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from benchmark.bench import Bench
from benchmark.cost_model import best_of
from benchmark.host_cost import surroundings, with_surroundings
from benchmark.noise import Noise
from benchmark.program import ROOT, flags_of, run_program, small_model
from benchmark.prompts import PromptSource, load_tokenizer
from benchmark.report import describe_machine
from kunserve_sglang.core.cost_model import fit
from kunserve_sglang.core.sizes import parse_size
from kunserve_sglang.execution.profile import UNHURRIED
from kunserve_sglang.simulation.cluster_profile import Links, Profile, StepCost, load_profile
from kunserve_sglang.testing.local_scheduler import local_scheduler

LINKS = Links(
    # Shared memory of one host: what demo.json's drop and restore moved in the time they stood
    # still. Hops are small copies and a wake-up.
    exchange_bytes_per_s=1.0e9,
    parameters_bytes_per_s=1.0e9,
    activations_bytes_per_s=1.0e9,
    hop_ms=1.0,
    transition_ms=25.0,
)


def measure_profile(flags: argparse.Namespace, model: Path) -> tuple[Profile, float]:
    """What one scheduler shows, and the share of the cores that other programs took meanwhile."""
    import torch

    from kunserve_sglang.instance.pipeline.profiling import measure
    from kunserve_sglang.sglang_seam.assembly import shapes_for

    with local_scheduler(
        model,
        memory_budget=parse_size("1GiB"),
        core=flags.core,
        chunked_prefill_size=flags.chunked_prefill_size,
    ) as scheduler:
        noise = Noise()
        work = shapes_for(scheduler)
        with torch.inference_mode():
            passes = [measure(scheduler.engine, work, UNHURRIED) for _ in range(flags.passes)]
            costs = fit(best_of(passes))
        runner: Any = scheduler.tp_worker.model_runner
        memory = runner.kv_cache_configurator.profile
        layers = scheduler.engine.layer_count
        profile = Profile(
            name=f"{model.name} on one core of {describe_machine()['cpu']}",
            source="measured by python -m benchmark.simulator_profile",
            layers=layers,
            memory_budget=flags.memory_budget,
            resident_bytes=runner.memory.resident_bytes,
            layer_bytes=max(memory.layer_pages) * memory.page_bytes,
            kv_bytes_per_token=layers * (memory.key_row_bytes + memory.value_row_bytes),
            activation_bytes_per_token=2
            * scheduler.model_config.hidden_size
            * runner.dtype.itemsize,
            page_bytes=memory.page_bytes,
            chunked_prefill_size=flags.chunked_prefill_size,
            max_running_requests=scheduler.max_running_requests,
            cost=costs,
            step=StepCost(delayed=True),
            links=LINKS,
        )
        return profile, noise.share()


def to_toml(profile: Profile, comment: str) -> str:
    """A profile as a file that `load_profile` reads, tables last."""
    lines = [*(f"# {line}" for line in comment.splitlines()), ""]
    tables: list[str] = []
    for name in profile.__struct_fields__:
        value = getattr(profile, name)
        if isinstance(value, str | int | float):
            lines.append(f"{name} = {_toml(value)}")
        else:
            tables += ["", f"[{name}]"]
            tables += [f"{k} = {_toml(getattr(value, k))}" for k in value.__struct_fields__]
    return "\n".join([*lines, *tables, ""])


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def parser() -> argparse.ArgumentParser:
    flags = flags_of("simulator_profile", "Measure this machine for the simulator.")
    flags.add_argument("--model-path", type=Path, help="a model folder (default: a small one)")
    flags.add_argument("--memory-budget", default="288MiB", help="of the simulated instances")
    flags.add_argument("--chunked-prefill-size", type=int, default=256)
    flags.add_argument("--core", type=int, default=0)
    flags.add_argument("--passes", type=int, default=3, help="runs; the best counts")
    profiles = ROOT / "python" / "kunserve_sglang" / "simulation" / "profiles"
    flags.add_argument("--output", type=Path, default=profiles / "smollm2-135m-cpu.toml")
    return flags


def _bench(flags: argparse.Namespace, model: Path, logs: Path, console: Console) -> Bench:
    return Bench(
        model_path=model,
        memory_budget=flags.memory_budget,
        trace=Path(),
        prompts=PromptSource(load_tokenizer(model), 1),
        repeat=flags.passes,
        seed=1,
        output=logs,
        console=console,
    )


def main() -> NoReturn:
    flags = parser().parse_args()
    run_program("simulator_profile", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    model = flags.model_path or small_model()
    with tempfile.TemporaryDirectory() as logs:
        section = _bench(flags, model, Path(logs), console).by_hand("profile", surroundings)
    alone, noise = measure_profile(flags, model)  # binds this process to its core
    profile = with_surroundings(alone, section.figures["seen"])
    comment = (
        "Instances on one core each: everything but links is measured.\n"
        f"Other programs took {max(noise, section.figures['noise']):.0%} of the cores meanwhile."
    )
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(to_toml(profile, comment))
    load_profile(flags.output)
    console.print(f"Written: {flags.output}")
    return 0


if __name__ == "__main__":
    main()

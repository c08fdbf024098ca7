"""What cache-aware dispatch is worth: `lmetric` against `round_robin` and `least_load`.

`python -m benchmark.dispatch` holds the same conversations (several turns, shared system prompts)
with three clusters of two instances that differ in `--dispatch` alone. All three are up at the same
time and get the load in turns, in another order each round and with empty caches; medians of the
rounds count. It writes `dispatch.json` with `rows` (one a policy) and `checks`; exit status 1 if a
check fails.

Lengths are scaled to a small model on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console

from benchmark.bench import NUM_INSTANCES, together
from benchmark.checks import Check, at_least, at_most, check_table
from benchmark.conversations import Mix, Turn, conversations, hold
from benchmark.noise import Noise
from benchmark.program import ROOT, SGLANG_FLAGS, flags_of, run_program, small_model
from benchmark.prompts import PromptSource, load_tokenizer
from benchmark.report import describe_machine, dumps
from kunserve_sglang.core.choices import DispatchPolicy
from kunserve_sglang.testing.cluster import Cluster, ClusterOptions

_COUNTERS = ("kunserve:prompt_tokens_total", "kunserve:predicted_hit_tokens_total")
_OTHERS = (DispatchPolicy.ROUND_ROBIN, DispatchPolicy.LEAST_LOAD)
_RATIO_BAR = 1.0


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one policy. Latencies in milliseconds; `hit_rate` is the share of prompt tokens
    that were cached, `predicted` what the router expected of it, NaN where it expects nothing;
    `noise` the share of the cores that other programs took.
    """

    hit_rate: float
    predicted: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    turns: int
    failed: int
    duration_s: float
    noise: float


def parser() -> argparse.ArgumentParser:
    flags = flags_of("dispatch", "Cache-aware dispatch against dispatch by turns and by load.")
    flags.add_argument("--model-path", type=Path, help="a model folder (default: a small one)")
    flags.add_argument("--memory-budget", default="448MiB", help="parameters + KV an instance")
    flags.add_argument("--rounds", type=int, default=3, help="of every policy; the median counts")
    flags.add_argument("--conversations", type=int, default=14, help="in a round")
    flags.add_argument("--seconds", type=float, default=18.0, help="in which they all begin")
    flags.add_argument("--seed", type=int, default=1, help="of texts and times")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results")
    return flags


def main() -> NoReturn:
    flags = parser().parse_args()
    run_program("dispatch", lambda console: run(flags, console))


def run(flags: argparse.Namespace, console: Console) -> int:
    """Measure, print, write; returns the exit status."""
    model = flags.model_path or small_model()
    mix = Mix(
        conversations=flags.conversations,
        starts_within_s=flags.seconds,
        system_prompts=4,
        system_len=400,
        turns=4,
        question_len=60,
        answer_len=8,
        mean_pause_s=3.0,
    )
    clusters = {policy: _cluster(policy, model, flags) for policy in DispatchPolicy}
    rounds: dict[DispatchPolicy, list[Round]] = {policy: [] for policy in DispatchPolicy}
    prompts = PromptSource(load_tokenizer(model), flags.seed)
    with together(*clusters.values()):
        for number in range(flags.rounds):
            planned = conversations(mix, prompts, flags.seed + number)
            for policy in _order(number):
                url = clusters[policy].url
                rounds[policy].append(measure(url, planned, mix.answer_len))
                console.print(f"round {number + 1} {policy}: {rounds[policy][-1]}", style="dim")
    rows = [row(policy, found) for policy, found in rounds.items()]
    checked = checks(rows)
    results: dict[str, Any] = {
        "command": f"python -m benchmark.dispatch --rounds {flags.rounds} --seed {flags.seed} "
        f"--conversations {flags.conversations} --seconds {flags.seconds:g}",
        "machine": describe_machine(),
        "setup": {
            "model": model.name,
            "instances": NUM_INSTANCES,
            "memory_budget": flags.memory_budget,
            "sglang_flags": list(SGLANG_FLAGS),
            "load": asdict(mix),
        },
        "rows": rows,
        "checks": [asdict(check) for check in checked],
    }
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "dispatch.json").write_text(dumps(results))
    console.print(check_table(results["checks"]))
    return 0 if all(check.ok for check in checked) else 1


def _cluster(policy: DispatchPolicy, model: Path, flags: argparse.Namespace) -> Cluster:
    options = ClusterOptions(
        model_path=model,
        memory_budget=flags.memory_budget,
        overload_policy="none",
        num_instances=NUM_INSTANCES,
        sglang_flags=SGLANG_FLAGS,
        kunserve_flags=("--dispatch", policy.value),
    )
    return Cluster(options.command, flags.output / f"dispatch-{policy}.log")


def _order(number: int) -> list[DispatchPolicy]:
    """Another one first in each round, so that what changes over time meets all alike."""
    policies = list(DispatchPolicy)
    first = number % len(policies)
    return [*policies[first:], *policies[:first]]


def measure(url: str, planned: Sequence[Any], answer_len: int) -> Round:
    """One round with empty caches."""
    _flush(url)
    before, noise = _expected(url), Noise()
    turns, duration = asyncio.run(_timed(url, planned, answer_len))
    prompt, hit = (b - a for a, b in zip(before, _expected(url), strict=True))
    return summarise(turns, duration, hit / prompt if prompt else float("nan"), noise.share())


async def _timed(url: str, planned: Sequence[Any], answer_len: int) -> tuple[list[Turn], float]:
    loop = asyncio.get_running_loop()
    started = loop.time()
    turns = await hold(url, planned, answer_len=answer_len)
    return turns, loop.time() - started


def summarise(turns: Sequence[Turn], duration_s: float, predicted: float, noise: float) -> Round:
    done = [turn for turn in turns if not turn.error]
    ttft_ms = [1e3 * turn.ttft_s for turn in done] or [float("nan")]
    tokens = sum(turn.prompt_tokens for turn in done)
    return Round(
        hit_rate=sum(turn.cached_tokens for turn in done) / max(1, tokens),
        predicted=predicted,
        ttft_p50_ms=float(np.percentile(ttft_ms, 50)),
        ttft_p99_ms=float(np.percentile(ttft_ms, 99)),
        turns=len(done),
        failed=len(turns) - len(done),
        duration_s=duration_s,
        noise=noise,
    )


def row(policy: DispatchPolicy, rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians of the rounds, and the rounds themselves."""
    names = ("hit_rate", "predicted", "ttft_p50_ms", "ttft_p99_ms", "duration_s", "noise")
    medians = {name: statistics.median(getattr(r, name) for r in rounds) for name in names}
    return {
        "name": policy.value,
        **medians,
        "turns": sum(r.turns for r in rounds),
        "failed": sum(r.failed for r in rounds),
        "rounds": [asdict(r) for r in rounds],
    }


def checks(rows: Sequence[dict[str, Any]]) -> list[Check]:
    """`lmetric` finds more cached than either, and answers no later."""
    by_name = {r["name"]: r for r in rows}
    ours = by_name[DispatchPolicy.LMETRIC]
    found = []
    for other in _OTHERS:
        theirs = by_name[other]
        gain = ours["hit_rate"] - theirs["hit_rate"]
        found.append(at_least(1, f"hit rate of lmetric less that of {other}", gain, 0.0))
        for name in ("p50", "p99"):
            ratio = ours[f"ttft_{name}_ms"] / theirs[f"ttft_{name}_ms"]
            what = f"{name.upper()} TTFT of lmetric / {other}"
            found.append(at_most(2, what, ratio, _RATIO_BAR))
    missed = abs(ours["predicted"] - ours["hit_rate"])
    found.append(at_most(3, "hit rate that the router expected, error", missed, 0.1))
    found.append(at_most(4, "failed requests, all policies", sum(r["failed"] for r in rows), 0))
    return found


def _flush(url: str) -> None:
    with urllib.request.urlopen(f"{url}/flush_cache?timeout=10", data=b"", timeout=30) as answer:
        answer.read()


def _expected(url: str) -> tuple[float, float]:
    """Prompt tokens sent by the router so far, and how many of them it expected to be cached."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = (re.search(rf"^{name} (\S+)$", text, re.MULTILINE) for name in _COUNTERS)
    sent, cached = (float(match[1]) if match else 0.0 for match in found)
    return sent, cached


if __name__ == "__main__":
    main()

"""Playing schedules with and without transitions, and comparing the tokens (invariant 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

from kunserve_sglang.api.events import Event
from kunserve_sglang.core.messages import Mode, TransitionKind
from kunserve_sglang.policy.planner import NoPlan
from kunserve_sglang.policy.transition_request import Outcome
from tests.support.cluster import ScriptedCluster
from tests.support.controlled import READY_S
from tests.support.schedules import Script
from tests.support.script import Gate, Output

PAGE = 4096
PAIR_GATES = ("drop 0,1", "restore 0,1", "drop 0,1", "restore 0,1")


def small_cluster(
    folder: Path,
    size: int,
    model: Path,
    *,
    memory_budget: int = 2_830_000,
    page_bytes: int = PAGE,
    **server: object,
) -> ScriptedCluster:
    """Budgets so small that requests queue and are retracted without a drop."""
    return ScriptedCluster(
        folder,
        size,
        memory_budget=memory_budget,
        page_bytes=page_bytes,
        model_path=str(model),
        chunked_prefill_size=64,
        max_running_requests=16,
        dtype="float32",
        schedule_conservativeness=0.1,
        context_length=1024,
        **server,
    )


def play_both(
    cluster: ScriptedCluster, scripts: list[Script], *, standing: bool = False
) -> tuple[list[Event], list[str]]:
    """Play undisturbed and with transitions; returns the events and what is amiss.

    That is what differs, and steps that have failed without a trace in the answers.
    """
    before = cluster.failures()
    expected = cluster.play(scripts)
    events, got = play_across(cluster, scripts, standing=standing)
    failed = cluster.failures() - before
    return events, differences(expected, got) + [f"{failed} steps have failed"] * bool(failed)


def play_across(
    cluster: ScriptedCluster, scripts: list[Script], *, standing: bool = False
) -> tuple[list[Event], list[dict[str, Output]]]:
    """Play with the transitions that gates stand for; returns the events and the answers.

    The members go on while a transition runs, or stand at their gates until it has ended. A
    restore for which requests hold too many slots is refused, as it must be; the layers then come
    back at the end.
    """
    events: list[Event] = []
    running: list[Future[Event]] = []

    def wait() -> None:
        while running:
            try:
                event = running.pop().result(READY_S)
            except NoPlan:
                continue
            if event.status is Outcome.ABORTED and "slots" in event.error:
                continue
            assert event.status is Outcome.COMMITTED, event
            events.append(event)

    def at_gate(name: str) -> None:
        wait()
        kind, instances, *stages = name.split()
        numbers = [int(i) for i in instances.split(",")]
        running.append(cluster.begin(TransitionKind(kind), numbers, *map(int, stages)))
        if standing:
            wait()

    got = cluster.play(scripts, at_gate)
    wait()
    if any(i["mode"] == Mode.COOPERATIVE for i in cluster.status()):
        events.append(cluster.restore_when_idle())
    return events, got


def play_into_a_drop(
    cluster: ScriptedCluster, scripts: list[Script], step: int
) -> tuple[list[dict[str, Output]], Future[Event]]:
    """Play, with a drop that begins at this step; returns the answers, and the drop to wait for."""
    gated: list[Script] = [[*script, (step, Gate("drop"))] for script in scripts]
    running: list[Future[Event]] = []
    got = cluster.play(
        [sorted(script, key=lambda x: x[0]) for script in gated],
        lambda _: running.append(cluster.begin(TransitionKind.DROP)),
    )
    return got, running[0]


def differences(
    expected: Sequence[Mapping[str, Output]], got: Sequence[Mapping[str, Output]]
) -> list[str]:
    """What was answered otherwise than expected; what was aborted, as far as it got."""
    return [
        f"member {m} request {rid}: {_first_difference(want, have[rid])}"
        for m, (wants, have) in enumerate(zip(expected, got, strict=True))
        for rid, want in wants.items()
        if not same(want, have[rid])
    ]


def _first_difference(want: Output, have: Output) -> str:
    """For people: where two answers part."""
    for name, before in asdict(want).items():
        if name != "cached" and not alike(before, getattr(have, name)):
            return f"{_parting(name, before, getattr(have, name))}, reason {want.reason}"
    return "equal"


def _parting(name: str, before: object, after: object) -> str:
    """The innermost difference between two values that differ."""
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        key = next(k for k in before if not alike(before[k], after[k]))
        return _parting(f"{name}.{key}", before[key], after[key])
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
        pairs = enumerate(zip(before, after, strict=False))
        place = next((i for i, (b, a) in pairs if not alike(b, a)), None)
        if place is not None:
            return _parting(f"{name}[{place}]", before[place], after[place])
        return f"{len(before)} and {len(after)} of {name}, the same as far as both go"
    return f"{name}: {before} != {after}"


def same(want: Output, have: Output) -> bool:
    if "abort" in (want.reason, have.reason):
        shorter = min(len(want.tokens), len(have.tokens))
        return want.tokens[:shorter] == have.tokens[:shorter] and all(
            all(map(alike, chunks, have.received.get(choice, ())))
            for choice, chunks in want.received.items()
        )
    return (
        want.tokens == have.tokens
        and want.reason == have.reason
        and want.end == have.end
        and alike(want.logprobs, have.logprobs)
        and alike(want.hidden, have.hidden)
        and alike(want.received, have.received)
    )


def alike(want: object, have: object) -> bool:
    """Equal but for rounding of floats, at any depth."""
    if isinstance(want, float) and isinstance(have, float):
        both_undefined = math.isnan(want) and math.isnan(have)
        return both_undefined or math.isclose(want, have, rel_tol=1e-4, abs_tol=1e-4)
    if isinstance(want, dict) and isinstance(have, dict):
        return want.keys() == have.keys() and all(alike(want[k], have[k]) for k in want)
    if isinstance(want, (list, tuple)) and isinstance(have, (list, tuple)):
        return len(want) == len(have) and all(map(alike, want, have))
    return want == have

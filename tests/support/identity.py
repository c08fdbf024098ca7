"""Playing schedules with and without transitions, and comparing the tokens (invariant 1)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

from kunserve_sglang.api.events import Event
from kunserve_sglang.core.messages import Mode, TransitionKind
from kunserve_sglang.policy.planner import NoPlan
from kunserve_sglang.policy.transition_request import Outcome
from tests.support.cluster import READY_S, ScriptedCluster
from tests.support.member import Gate, Output
from tests.support.schedules import Script

PAGE = 4096
PAIR_GATES = ("drop 0,1", "restore 0,1", "drop 0,1", "restore 0,1")


def small_cluster(
    folder: Path, size: int, model: Path, *, memory_budget: int = 2_600_000, **server: object
) -> ScriptedCluster:
    """Budgets so small that requests queue and are retracted without a drop."""
    return ScriptedCluster(
        folder,
        size,
        memory_budget=memory_budget,
        page_bytes=PAGE,
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
    """Play undisturbed and with transitions; returns the events and what differs.

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

    expected = cluster.play(scripts)
    got = cluster.play(scripts, at_gate)
    wait()
    if any(i["mode"] == Mode.COOPERATIVE for i in cluster.status()):
        events.append(restored(cluster))
    return events, differences(expected, got)


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
        after = getattr(have, name)
        if name == "cached" or alike(before, after):
            continue
        if isinstance(before, dict) and before.keys() == after.keys():
            name, before, after = next(
                (f"{name}.{k}", before[k], after[k])
                for k in before
                if not alike(before[k], after[k])
            )
        if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
            pairs = enumerate(zip(before, after, strict=False))
            place = next((i for i, (b, a) in pairs if not alike(b, a)), None)
            sizes = f"{len(before)} and {len(after)} of {name}, the same up to "
            if place is None:
                return sizes + "the shorter one's end"
            return sizes + f"{place}: {before[place]} != {after[place]}, reason {want.reason}"
        return f"{name}: {before} != {after}"
    return "equal"


def restored(cluster: ScriptedCluster) -> Event:
    """All have ended, but the router may not know it yet: its status records are older."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            return cluster.transition(TransitionKind.RESTORE)
        except NoPlan:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def same(want: Output, have: Output) -> bool:
    if "abort" in (want.reason, have.reason):
        shorter = min(len(want.tokens), len(have.tokens))
        return want.tokens[:shorter] == have.tokens[:shorter]
    return (
        want.tokens == have.tokens
        and want.reason == have.reason
        and want.end == have.end
        and alike(want.logprobs, have.logprobs)
        and alike(want.hidden, have.hidden)
    )


def alike(want: object, have: object) -> bool:
    """Equal but for rounding of floats, at any depth."""
    if isinstance(want, float) and isinstance(have, float):
        return math.isclose(want, have, rel_tol=1e-4, abs_tol=1e-4)
    if isinstance(want, dict) and isinstance(have, dict):
        return want.keys() == have.keys() and all(alike(want[k], have[k]) for k in want)
    if isinstance(want, (list, tuple)) and isinstance(have, (list, tuple)):
        return len(want) == len(have) and all(map(alike, want, have))
    return want == have

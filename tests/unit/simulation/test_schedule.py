"""The simulator forms the very batches that SGLang's scheduler forms, step by step."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.simulation.cluster_profile import HostCost
from kunserve_sglang.simulation.costs import Costs
from kunserve_sglang.simulation.host import SimulatedHost
from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.owner import Owner
from kunserve_sglang.simulation.solo import Solo
from tests.support.places import ROOT
from tests.support.schedule_of_sglang import CHUNK, MAX_RUNNING
from tests.unit.simulation.test_cluster import LAYERS, profile

SECOND = 1000.0 / LAYERS

Request = list[int]
"""Step before which it arrives, prompt tokens, output tokens."""


def requests(seed: int, prompts: tuple[int, int], outputs: tuple[int, int]) -> list[Request]:
    """Many more than fit at once, so that the scheduler is never idle in between."""
    chance = random.Random(seed)
    steps = [*[0] * 10, *(chance.randint(0, 150) for _ in range(50))]
    return sorted([step, chance.randint(*prompts), chance.randint(*outputs)] for step in steps)


def of_sglang(model: Path, load: list[Request], cache: Path) -> tuple[int, list[Any]]:
    """Slots of the instance, and its batches."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.schedule_of_sglang", str(model)],
        input=json.dumps(load),
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["slots"], answer["batches"]


class Recorder(Solo):
    """Remembers its batches, in the form of `tests.support.schedule_of_sglang`."""

    def __init__(self, owner: Owner, costs: Costs) -> None:
        super().__init__(owner, costs, SimulatedHost(HostCost()))
        self.batches: list[Any] = []

    def fire(self, now: float) -> Owner:
        if self._pieces:
            self.batches.append([[before, tokens] for _, before, tokens in self._pieces])
        else:
            self.batches += [self.owner.count] * self._steps
        return super().fire(now)


def of_the_simulator(load: list[Request], slots: int) -> tuple[Owner, list[Any]]:
    """Every step takes a second; who arrives before step n comes half a second earlier."""
    machine = profile(
        chunk=CHUNK,
        cost=CostModel(prefill=(SECOND, 0, 0, 0, 0, 0), decode=(SECOND, 0, 0)),
        max_running_requests=MAX_RUNNING,
    )
    owner = Owner(0, slots, machine)
    solo = Recorder(owner, Costs(machine))
    solo.stop(0.0)
    pending = [Job(i, max(0.0, s - 0.5), p, o) for i, (s, p, o) in enumerate(load)]
    while pending and not pending[0].arrival:
        owner.add(pending.pop(0))
    solo.resume(0.0)
    while solo.busy:
        while pending and pending[0].arrival < solo.due:
            job = pending.pop(0)
            owner.add(job)
            solo.arrived(0, job.arrival)
        solo.fire(solo.due)
    assert not pending
    return owner, solo.batches


@pytest.mark.parametrize(
    ("seed", "prompts", "outputs", "retracts"),
    [(2, (1, 150), (1, 60), False), (5, (1, 40), (60, 160), True)],
    ids=["long prompts", "long outputs"],
)
def test_batches_are_those_of_sglang(
    tiny_model: Path,
    tmp_path: Path,
    seed: int,
    prompts: tuple[int, int],
    outputs: tuple[int, int],
    retracts: bool,
) -> None:
    load = requests(seed, prompts, outputs)
    slots, expected = of_sglang(tiny_model, load, tmp_path)
    owner, found = of_the_simulator(load, slots)
    assert found == expected
    assert len(found) > 400
    assert bool(owner.retractions) or not retracts

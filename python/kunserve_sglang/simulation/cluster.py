"""The event loop: arrivals, instances and groups, and the control loop's looks at them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.load import Load
from kunserve_sglang.policy.controller import WATCH_INTERVAL_S
from kunserve_sglang.simulation.cluster_profile import Profile
from kunserve_sglang.simulation.control_loop import ControlLoop
from kunserve_sglang.simulation.instances import Instances
from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.result import ClusterSample, SimulationResult
from kunserve_sglang.simulation.traces import TraceRow

_LOOKS_PER_S = 4000
"""The most instances that a router looks at in a second, since each look takes it some time."""

_SAMPLES = 600
_RESTORE_WAIT_S = 120.0
"""A run ends this long after the last answer even if not all layers are back."""

Progress = Callable[[int, float], None]
"""Requests finished, and the simulated time in seconds."""


class SimulatedCluster:
    """Instances of one profile under one policy. Use once: `run`."""

    def __init__(
        self,
        profile: Profile,
        config: ClusterConfig,
        *,
        watch_interval_s: float | None = None,
    ) -> None:
        count = config.num_instances
        self._profile = profile
        self._instances = Instances(profile, config)
        self._control = ControlLoop(profile, config, self._instances)
        self._watch_s = watch_interval_s or max(WATCH_INTERVAL_S, count / _LOOKS_PER_S)
        self._result = SimulationResult(count, config.overload_policy.value, [])
        self._next_sample = 0.0
        self._sample_s = 0.0
        self._sampled = 0.0

    def run(
        self, rows: Sequence[TraceRow], on_progress: Progress | None = None
    ) -> SimulationResult:
        """Serve all requests to their end; raises `ConfigurationError` if none could fit."""
        started, cpu = time.perf_counter(), time.process_time()
        result = self._result
        jobs = [
            Job(i, r.arrival_s, r.prompt_len, r.output_len, r.level) for i, r in enumerate(rows)
        ]
        result.jobs = [job for job in jobs if self._fits(job)]
        result.refused = len(jobs) - len(result.jobs)
        if not result.jobs:
            capacity = self._instances.capacity
            raise ConfigurationError(
                f"no request of the trace fits an instance of {capacity} token slots"
            )
        owners = self._instances.owners
        result.capacity = self._instances.capacity * len(owners)
        self._sample_s = max(self._watch_s, result.jobs[-1].arrival / _SAMPLES)
        self._loop(result.jobs, on_progress)
        ends = [job.end for job in result.jobs if not job.failed]
        result.duration_s = max(ends, default=0.0) - result.jobs[0].arrival
        result.events = self._control.events
        result.retractions = sum(owner.retractions for owner in owners)
        result.wall_s = time.perf_counter() - started
        result.cpu_s = time.process_time() - cpu
        return result

    def _fits(self, job: Job) -> bool:
        """SGLang would never admit it otherwise, and it could wait for good."""
        return job.prompt + job.output + 1 < self._instances.capacity

    # -- the loop --------------------------------------------------------------------------------

    def _loop(self, jobs: list[Job], on_progress: Progress | None) -> None:
        instances, upcoming, steps = self._instances, 0, 0
        frontend = self._profile.frontend_ms / 1e3
        arrival, watch = jobs[0].arrival + frontend, 0.0
        while True:
            due = instances.due
            phase = self._control.due
            if arrival <= due and arrival <= watch and arrival <= phase:
                instances.arrive(jobs[upcoming], arrival)
                upcoming += 1
                more = upcoming < len(jobs)
                arrival = jobs[upcoming].arrival + frontend if more else math.inf
            elif watch <= due and watch <= phase:
                if self._watch(watch, jobs, on_progress):
                    break
                watch += self._watch_s
            elif phase <= due:
                self._control.phase_ended(phase)
            else:
                steps += 1
                runner = instances.fire()
                if runner is not None and runner.stopping and runner.resting:
                    self._control.rested(due)
        self._result.steps = steps

    # -- the control plane -----------------------------------------------------------------------

    def _watch(self, now: float, jobs: list[Job], on_progress: Progress | None) -> bool:
        """Look at the cluster, and act; whether the run is over."""
        instances = self._instances
        finished = instances.finished
        if on_progress is not None:
            on_progress(finished, now)
        over = finished == len(jobs)
        if over and not self._control.busy:
            last = max((job.end for job in jobs if not job.failed), default=now)
            if not instances.cooperative or now - last > _RESTORE_WAIT_S:
                self._sample(now, instances.loads(now))
                return True
        if self._control.idle and now < self._next_sample:
            return False
        loads = instances.loads(now)
        if now >= self._next_sample:
            self._sample(now, loads)
            self._next_sample = now + self._sample_s
        self._control.look(now, loads)
        return False

    def _sample(self, now: float, loads: Iterable[Load]) -> None:
        loads = list(loads)
        cooperative = self._instances.cooperative
        self._result.samples.append(
            ClusterSample(
                at_s=now,
                running=sum(load.running for load in loads),
                waiting=sum(load.waiting for load in loads),
                slots_used=sum(load.slots.used for load in loads),
                slots_capacity=sum(load.slots.capacity for load in loads),
                demand=sum(load.demand for load in loads),
                cooperative=cooperative,
            )
        )
        self._result.cooperative_s += cooperative * (now - self._sampled)
        self._sampled = now

"""The event loop: arrivals, instances and groups, and the control plane's look at them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.messages import Load, TransitionKind
from kunserve_sglang.core.settings import ClusterConfig
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.simulation.cluster_profile import Profile
from kunserve_sglang.simulation.control import Control
from kunserve_sglang.simulation.instances import Instances
from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.outcome import Event, Outcome, Sample
from kunserve_sglang.simulation.traces import TraceRow
from kunserve_sglang.simulation.transitions import Phase, Running

WATCH_INTERVAL_S = 0.05
"""As `control.control_plane`."""

_INSTANCES_PER_WATCH_S = 4000
"""Looking at an instance takes a router some time: so many it looks at in a second, at most."""

_SAMPLES = 600
_RESTORE_WAIT_S = 120.0
"""A run ends when all requests are answered and all layers are back, or after so long."""

Progress = Callable[[int, float], None]
"""Requests finished, and the simulated time in seconds."""


class Cluster:
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
        self._control = Control(config)
        self._instances = Instances(profile, config)
        self._watch_s = watch_interval_s or max(WATCH_INTERVAL_S, count / _INSTANCES_PER_WATCH_S)
        self._transition: Running | None = None
        self._outcome = Outcome(count, config.overload_policy.value, [])
        self._next_sample = 0.0
        self._sample_s = 0.0
        self._sampled = 0.0

    def run(self, rows: Sequence[TraceRow], on_progress: Progress | None = None) -> Outcome:
        """Serve all requests to their end; raises `ConfigurationError` if none could fit."""
        started, cpu = time.perf_counter(), time.process_time()
        outcome = self._outcome
        jobs = [Job(i, r.arrival_s, r.prompt_len, r.output_len) for i, r in enumerate(rows)]
        outcome.jobs = [job for job in jobs if self._fits(job)]
        outcome.refused = len(jobs) - len(outcome.jobs)
        if not outcome.jobs:
            capacity = self._instances.capacity
            raise ConfigurationError(
                f"no request of the trace fits an instance of {capacity} token slots"
            )
        owners = self._instances.owners
        outcome.capacity = self._instances.capacity * len(owners)
        self._sample_s = max(self._watch_s, outcome.jobs[-1].arrival / _SAMPLES)
        self._loop(outcome.jobs, on_progress)
        ends = [job.end for job in outcome.jobs if not job.failed]
        outcome.duration_s = max(ends, default=0.0) - outcome.jobs[0].arrival
        outcome.retractions = sum(owner.retractions for owner in owners)
        outcome.wall_s = time.perf_counter() - started
        outcome.cpu_s = time.process_time() - cpu
        return outcome

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
            transition = self._transition
            exchange = transition.due if transition is not None else math.inf
            if arrival <= due and arrival <= watch and arrival <= exchange:
                instances.arrive(jobs[upcoming], arrival)
                upcoming += 1
                more = upcoming < len(jobs)
                arrival = jobs[upcoming].arrival + frontend if more else math.inf
            elif watch <= due and watch <= exchange:
                if self._watch(watch, jobs, on_progress):
                    break
                watch += self._watch_s
            elif exchange <= due:
                self._phase_ended(exchange)
            else:
                steps += 1
                runner = instances.fire()
                if runner is not None and runner.stopping and runner.resting:
                    self._rested(due)
        self._outcome.steps = steps

    # -- the control plane -----------------------------------------------------------------------

    def _watch(self, now: float, jobs: list[Job], on_progress: Progress | None) -> bool:
        """Look at the cluster, and act; whether the run is over."""
        instances = self._instances
        finished = instances.finished
        if on_progress is not None:
            on_progress(finished, now)
        over = finished == len(jobs)
        if over and self._transition is None:
            last = max((job.end for job in jobs if not job.failed), default=now)
            if not instances.cooperative or now - last > _RESTORE_WAIT_S:
                self._sample(now, instances.loads(now))
                return True
        if not self._control.auto and now < self._next_sample:
            return False
        loads = instances.loads(now)
        if now >= self._next_sample:
            self._sample(now, loads)
            self._next_sample = now + self._sample_s
        if self._transition is not None:
            self._look_after(self._transition, now, loads)
        elif self._control.auto:
            plan = self._control.decide(now, instances.state(loads))
            if plan is not None:
                self._transition = Running(plan, now)
                self._begin_step(self._transition, now)
        return False

    def _sample(self, now: float, loads: Iterable[Load]) -> None:
        loads = list(loads)
        cooperative = self._instances.cooperative
        self._outcome.samples.append(
            Sample(
                at_s=now,
                running=sum(load.running for load in loads),
                waiting=sum(load.waiting for load in loads),
                slots_used=sum(load.slots.used for load in loads),
                slots_capacity=sum(load.slots.capacity for load in loads),
                demand=sum(load.demand for load in loads),
                cooperative=cooperative,
            )
        )
        self._outcome.cooperative_s += cooperative * (now - self._sampled)
        self._sampled = now

    # -- transitions -----------------------------------------------------------------------------

    def _begin_step(self, transition: Running, now: float) -> None:
        step = transition.step
        if step.grows and not step.ahead:  # nobody stops for that
            self._instances.adopt(step.after)
            self._instances.resume(transition.plan.instances, now)
            self._step_ended(transition, now)
            return
        transition.stop(now)
        self._instances.stop(transition.plan.instances, now)
        self._rested(now)

    def _rested(self, now: float) -> None:
        """A member has come to rest; with all of them, votes are cast and the step is done."""
        transition = self._transition
        if transition is None or transition.phase is not Phase.STOPPING:
            return
        numbers, owners = transition.plan.instances, self._instances.owners
        if not self._instances.resting(numbers):
            return
        transition.rested(now)
        used = {i: owners[i].used for i in numbers}
        after = {m.instance: m for x in transition.step.after for m in x.members}
        needed = {i: max(used[i], owners[i].largest_request()) for i in used}
        if any(needed[i] > after[i].capacity for i in needed):
            self._give_up(transition, now)
        else:
            transition.stand(now, used, self._instances.memory, self._profile)

    def _phase_ended(self, now: float) -> None:
        transition = self._transition
        assert transition is not None
        if transition.phase is Phase.STANDING:
            self._instances.adopt(transition.step.after)
            transition.serve(now)
            self._instances.resume(transition.plan.instances, now)
            if transition.in_background:
                transition.pace(now, busy=self._busy(transition.plan))
                return
        transition.arrived(now)
        self._step_ended(transition, now)

    def _step_ended(self, transition: Running, now: float) -> None:
        if transition.number + 1 < len(transition.steps):
            transition.number += 1
            self._begin_step(transition, now)
        else:
            self._end_transition(transition, now, "committed")

    def _look_after(self, transition: Running, now: float, loads: Sequence[Load]) -> None:
        """Bytes move while members serve: how fast, and whether that is still wanted."""
        if transition.phase is not Phase.MOVING:
            return
        transition.pace(now, busy=self._busy(transition.plan))
        if transition.step.ahead:
            state = self._instances.state(loads)
            if self._control.unwanted(transition.plan, state):
                self._give_up(transition, now)

    def _give_up(self, transition: Running, now: float) -> None:
        """The group goes on as it was before the first step."""
        undo = transition.plan.undo
        if undo is not None:
            self._instances.adopt(undo.after)
        self._instances.resume(transition.plan.instances, now)
        self._end_transition(transition, now, "aborted")

    def _busy(self, plan: Plan) -> bool:
        return not self._instances.resting(plan.instances)

    def _end_transition(self, transition: Running, now: float, status: str) -> None:
        plan, committed = transition.plan, status == "committed"
        self._transition = None
        self._control.ended(now, plan.transition.kind, committed=committed)
        dropped = committed and plan.transition.kind is TransitionKind.DROP
        self._outcome.events.append(
            Event(
                kind=plan.transition.kind,
                reason=plan.reason,
                instances=plan.instances,
                status=status,
                time=transition.began,
                waited_s=transition.waited_s,
                stall_s=transition.stall_s,
                moving_s=transition.moving_s,
                freed_bytes=plan.freed_bytes if dropped else 0,
                exchanged_bytes=transition.exchanged_bytes,
                loaded_bytes=transition.loaded_bytes,
                capacity_before=plan.capacity_before,
                capacity_after=sum(self._instances.owners[i].capacity for i in plan.instances),
            )
        )

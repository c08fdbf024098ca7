"""The event loop: arrivals, instances and groups, and the control plane's look at them."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable, Sequence

from kunserve_sglang.config import ClusterConfig, MicroBatches
from kunserve_sglang.errors import ConfigurationError
from kunserve_sglang.layout import LayerRange, Layout, Member
from kunserve_sglang.messages import Load, TransitionKind
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.state import ClusterState, InstanceState
from kunserve_sglang.simulation.control import Control
from kunserve_sglang.simulation.costs import Costs
from kunserve_sglang.simulation.dispatch import Dispatch
from kunserve_sglang.simulation.group import Group
from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.outcome import Event, Outcome, Sample
from kunserve_sglang.simulation.owner import Owner
from kunserve_sglang.simulation.profile import Profile
from kunserve_sglang.simulation.solo import Solo
from kunserve_sglang.simulation.transitions import Phase, Running
from kunserve_sglang.traces import TraceRow

WATCH_INTERVAL_S = 0.05
"""As `router.control_plane`."""

_INSTANCES_PER_WATCH_S = 4000
"""Looking at an instance takes a router some time: so many it looks at in a second, at most."""

_SAMPLES = 600
_RESTORE_WAIT_S = 120.0
"""A run ends when all requests are answered and all layers are back, or after so long."""

Runner = Solo | Group
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
        self._config = config
        self._memory = profile.memory(min(config.max_group_size, count))
        self._costs = Costs(profile)
        self._control = Control(config)
        self._dispatch = Dispatch(config.dispatch, count)
        self._watch_s = watch_interval_s or max(WATCH_INTERVAL_S, count / _INSTANCES_PER_WATCH_S)
        layers = LayerRange(0, profile.layers)
        self._capacity = self._memory.capacity(layers, 1)
        self._owners = [Owner(i, self._capacity, profile) for i in range(count)]
        self._runners: list[Runner] = [Solo(owner, self._costs) for owner in self._owners]
        self._layouts = [Layout(epoch=0, members=(self._alone(i, layers),)) for i in range(count)]
        self._states: list[InstanceState | None] = [None] * count
        self._heap: list[tuple[float, int, Runner]] = []
        self._sequence = 0
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
            raise ConfigurationError(
                f"no request of the trace fits an instance of {self._capacity} token slots"
            )
        outcome.capacity = self._capacity * len(self._owners)
        self._sample_s = max(self._watch_s, outcome.jobs[-1].arrival / _SAMPLES)
        for number, owner in enumerate(self._owners):
            self._dispatch.update(number, 0, 0, owner.capacity)
        self._loop(outcome.jobs, on_progress)
        ends = [job.end for job in outcome.jobs if not job.failed]
        outcome.duration_s = max(ends, default=0.0) - outcome.jobs[0].arrival
        outcome.retractions = sum(owner.retractions for owner in self._owners)
        outcome.wall_s = time.perf_counter() - started
        outcome.cpu_s = time.process_time() - cpu
        return outcome

    def _fits(self, job: Job) -> bool:
        """SGLang would never admit it otherwise, and it could wait for good."""
        return job.prompt + job.output + 1 < self._capacity

    # -- the loop --------------------------------------------------------------------------------

    def _loop(self, jobs: list[Job], on_progress: Progress | None) -> None:
        heap, upcoming, steps = self._heap, 0, 0
        frontend = self._profile.frontend_ms / 1e3
        arrival, watch = jobs[0].arrival + frontend, 0.0
        while True:
            due = heap[0][0] if heap else math.inf
            transition = self._transition
            exchange = transition.due if transition is not None else math.inf
            if arrival <= due and arrival <= watch and arrival <= exchange:
                self._arrive(jobs[upcoming], arrival)
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
                runner = heapq.heappop(heap)[2]
                if due == runner.due:  # else it has been put off since
                    runner.queued = math.inf
                    owner = runner.fire(due)
                    self._queue(runner)
                    if owner is not None:
                        self._report(owner, 0)
                    if runner.stopping and runner.resting:
                        self._rested(due)
        self._outcome.steps = steps

    def _queue(self, runner: Runner) -> None:
        """Put the runner's next event into the heap; an earlier entry goes stale by itself."""
        if runner.due != runner.queued:
            runner.queued = runner.due
            if runner.due != math.inf:
                self._sequence += 1
                heapq.heappush(self._heap, (runner.due, self._sequence, runner))

    def _arrive(self, job: Job, now: float) -> None:
        number = self._dispatch.choose()
        runner = self._runners[number]
        owner = self._owners[number]
        owner.add(job)
        runner.arrived(number, now)
        self._queue(runner)
        self._report(owner, runner.steps_done(now))

    def _report(self, owner: Owner, steps_ahead: int) -> None:
        """A status record: the router knows how things stand."""
        self._dispatch.update(
            owner.number,
            owner.running + len(owner.waiting),
            owner.demand(steps_ahead),
            owner.capacity,
        )

    # -- the control plane -----------------------------------------------------------------------

    def _watch(self, now: float, jobs: list[Job], on_progress: Progress | None) -> bool:
        """Look at the cluster, and act; whether the run is over."""
        finished = sum(owner.finished for owner in self._owners)
        if on_progress is not None:
            on_progress(finished, now)
        cooperative = any(isinstance(runner, Group) for runner in self._runners)
        over = finished == len(jobs)
        if over and self._transition is None:
            last = max((job.end for job in jobs if not job.failed), default=now)
            if not cooperative or now - last > _RESTORE_WAIT_S:
                self._sample(now, self._loads(now))
                return True
        if not self._control.auto and now < self._next_sample:
            return False
        loads = self._loads(now)
        if now >= self._next_sample:
            self._sample(now, loads)
            self._next_sample = now + self._sample_s
        if self._transition is not None:
            self._look_after(self._transition, now, loads)
        elif self._control.auto:
            plan = self._control.decide(now, self._state(loads))
            if plan is not None:
                self._transition = Running(plan, now)
                self._begin_step(self._transition, now)
        return False

    def _loads(self, now: float) -> list[Load]:
        loads: list[Load] = []
        for owner, runner in zip(self._owners, self._runners, strict=True):
            load = owner.load(runner.steps_done(now))
            loads.append(load)
            self._dispatch.update(
                owner.number, load.running + load.waiting, load.demand, owner.capacity
            )
        return loads

    def _state(self, loads: Sequence[Load]) -> ClusterState:
        states = []
        for number, load in enumerate(loads):
            state = self._states[number]
            layout = self._layouts[number]
            if state is None or state.load != load or state.layout is not layout:
                state = self._states[number] = InstanceState(
                    instance=number,
                    address="",
                    memory=self._memory,
                    layout=layout,
                    load=load,
                    costs=self._profile.cost,
                )
            states.append(state)
        return ClusterState(instances=tuple(states))

    def _sample(self, now: float, loads: Iterable[Load]) -> None:
        loads = list(loads)
        cooperative = sum(isinstance(runner, Group) for runner in self._runners)
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
            self._adopt(step.after)
            self._resume(transition.plan, now)
            self._step_ended(transition, now)
            return
        transition.stop(now)
        for runner in self._runners_of(transition.plan):
            runner.stop(now)
            self._queue(runner)
        self._rested(now)

    def _rested(self, now: float) -> None:
        """A member has come to rest; with all of them, votes are cast and the step is done."""
        transition = self._transition
        if transition is None or transition.phase is not Phase.STOPPING:
            return
        if not all(r.resting for r in self._runners_of(transition.plan)):
            return
        transition.rested(now)
        used = {i: self._owners[i].used for i in transition.plan.instances}
        after = {m.instance: m for x in transition.step.after for m in x.members}
        needed = {i: max(used[i], self._owners[i].largest_request()) for i in used}
        if any(needed[i] > after[i].capacity for i in needed):
            self._give_up(transition, now)
        else:
            transition.stand(now, used, self._memory, self._profile)

    def _phase_ended(self, now: float) -> None:
        transition = self._transition
        assert transition is not None
        if transition.phase is Phase.STANDING:
            self._adopt(transition.step.after)
            transition.serve(now)
            self._resume(transition.plan, now)
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
        if transition.step.ahead and self._control.unwanted(transition.plan, self._state(loads)):
            self._give_up(transition, now)

    def _give_up(self, transition: Running, now: float) -> None:
        """The group goes on as it was before the first step."""
        undo = transition.plan.undo
        if undo is not None:
            self._adopt(undo.after)
        self._resume(transition.plan, now)
        self._end_transition(transition, now, "aborted")

    def _runners_of(self, plan: Plan) -> list[Runner]:
        return list({id(self._runners[i]): self._runners[i] for i in plan.instances}.values())

    def _busy(self, plan: Plan) -> bool:
        return not all(runner.resting for runner in self._runners_of(plan))

    def _resume(self, plan: Plan, now: float) -> None:
        for runner in self._runners_of(plan):
            runner.resume(now)
            self._queue(runner)
        for number in plan.instances:
            self._report(self._owners[number], self._runners[number].steps_done(now))

    def _adopt(self, layouts: Iterable[Layout]) -> None:
        for layout in layouts:
            for member in layout.members:
                owner = self._owners[member.instance]
                owner.capacity = member.capacity
                owner.full = False
            if _placed(layout) != _placed(self._layouts[layout.ids[0]]):
                self._regroup(layout)
                self._dispatch.regroup(tuple(layout.ids))
            for number in layout.ids:
                self._layouts[number] = layout

    def _regroup(self, layout: Layout) -> None:
        """The members run other layers than before, or with others."""
        owners = [self._owners[m.instance] for m in layout.members]
        for owner in owners:
            cooperated = isinstance(self._runners[owner.number], Group)
            if layout.cooperative and not cooperated:
                owner.to_group()
            elif cooperated and not layout.cooperative:
                owner.to_solo()
        runner: Runner
        if layout.cooperative:
            runner = Group(
                layout,
                owners,
                self._costs,
                self._profile.links,
                self._profile.activation_bytes_per_token,
                split=self._config.micro_batches is MicroBatches.LOOKAHEAD,
            )
        else:
            runner = Solo(owners[0], self._costs)
        for owner in owners:
            self._runners[owner.number] = runner

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
                capacity_after=sum(self._owners[i].capacity for i in plan.instances),
            )
        )

    def _alone(self, number: int, layers: LayerRange) -> Member:
        return Member(instance=number, layers=layers, capacity=self._capacity, address="")


def _placed(layout: Layout) -> list[tuple[int, LayerRange]]:
    return [(m.instance, m.layers) for m in layout.members]

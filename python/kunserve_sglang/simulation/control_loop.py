"""The router's control loop in simulated time: the controller decides, instances obey."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.load import Load
from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.controller import TELL_INTERVAL_S, Controller
from kunserve_sglang.policy.decision import Decision, NoPlan
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.staging import STEPS
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.transition_request import Outcome, TransitionRequest
from kunserve_sglang.simulation.cluster_profile import Profile
from kunserve_sglang.simulation.instances import Instances
from kunserve_sglang.simulation.result import SimulatedEvent
from kunserve_sglang.simulation.running_transition import Phase, RunningTransition


class ControlLoop:
    """Carries out what `policy.controller` asks for, one transition at a time.

    `events` are the transitions that have ended, and those declined.
    """

    def __init__(self, profile: Profile, config: ClusterConfig, instances: Instances) -> None:
        self.events: list[SimulatedEvent] = []
        self._profile = profile
        self._instances = instances
        self._controller = Controller(config)
        self._running: RunningTransition | None = None
        self._epoch = 1
        self._tell_at = 0.0

    @property
    def busy(self) -> bool:
        """A transition is under way."""
        return self._running is not None

    @property
    def due(self) -> float:
        """When the phase of the transition under way ends; infinite without one."""
        return self._running.due if self._running is not None else math.inf

    @property
    def idle(self) -> bool:
        """Nothing is going to be asked for, whatever the load: nobody may drop or has dropped."""
        return not self._controller.auto and not self._instances.cooperative

    def look(self, now: float, loads: Sequence[Load]) -> None:
        """One look at the cluster, and what comes of it."""
        state = self._instances.state(loads)
        if now >= self._tell_at:
            self._tell_at = now + TELL_INTERVAL_S
            controller = self._controller
            self._instances.limit(controller.bounds(state), controller.first_token(state))
        if self._running is not None:
            self._look_after(self._running, now, state)
        else:
            self._decide(now, state)

    def _decide(self, now: float, state: ClusterState) -> None:
        request = self._controller.decide(now, state)
        if request is None:
            return
        epoch, self._epoch = self._epoch, self._epoch + STEPS
        try:
            plan = self._controller.plan(request, state, epoch)
        except NoPlan as error:
            if (decision := self._controller.refused(now, error)) is not None:
                self.events.append(_declined(now, request, str(error), decision, state))
            return
        self._running = RunningTransition(self._controller.in_steps(plan, state), now)
        self._begin_step(self._running, now)

    def _look_after(self, running: RunningTransition, now: float, state: ClusterState) -> None:
        """Bytes move while members serve: how fast, and whether that is still wanted."""
        if running.phase is not Phase.MOVING:
            return
        running.pace(now, busy=self._busy(running.plan))
        if running.step.ahead and self._controller.unwanted(running.plan, state):
            self._give_up(running, now)

    # -- the steps of a transition ---------------------------------------------------------------

    def _begin_step(self, running: RunningTransition, now: float) -> None:
        step = running.step
        if step.grows and not step.ahead:  # nobody stops for that
            self._instances.adopt(step.after)
            self._instances.resume(running.plan.instances, now)
            self._step_ended(running, now)
            return
        running.stop(now)
        self._instances.stop(running.plan.instances, now)
        self.rested(now)

    def rested(self, now: float) -> None:
        """A member has come to rest; with all of them, votes are cast and the step is done."""
        running = self._running
        if running is None or running.phase is not Phase.STOPPING:
            return
        numbers, owners = running.plan.instances, self._instances.owners
        if not self._instances.resting(numbers):
            return
        running.rested(now)
        used = {i: owners[i].used for i in numbers}
        after = {m.instance: m for x in running.step.after for m in x.members}
        needed = {i: max(used[i], owners[i].largest_request()) for i in used}
        if any(needed[i] > after[i].capacity for i in needed):
            self._give_up(running, now)
        else:
            running.stand(now, used, self._instances.memory, self._profile)

    def phase_ended(self, now: float) -> None:
        """`due` has come."""
        running = self._running
        assert running is not None
        if running.phase is Phase.STANDING:
            self._instances.adopt(running.step.after)
            running.serve(now)
            self._instances.resume(running.plan.instances, now)
            if running.in_background:
                running.pace(now, busy=self._busy(running.plan))
                return
        running.arrived(now)
        self._step_ended(running, now)

    def _step_ended(self, running: RunningTransition, now: float) -> None:
        if running.number + 1 < len(running.steps):
            running.number += 1
            self._begin_step(running, now)
        else:
            self._end(running, now, Outcome.COMMITTED)

    def _give_up(self, running: RunningTransition, now: float) -> None:
        """The group goes on as it was before the first step."""
        undo = running.plan.undo
        if undo is not None:
            self._instances.adopt(undo.after)
        self._instances.resume(running.plan.instances, now)
        self._end(running, now, Outcome.ABORTED)

    def _busy(self, plan: Plan) -> bool:
        return not self._instances.resting(plan.instances)

    def _end(self, running: RunningTransition, now: float, outcome: Outcome) -> None:
        plan = running.plan
        kind = plan.transition.kind
        self._running = None
        self._controller.ended(now, kind, outcome)
        dropped = outcome is Outcome.COMMITTED and kind is TransitionKind.DROP
        self.events.append(
            SimulatedEvent(
                kind=kind,
                reason=plan.reason,
                decision=plan.decision,
                instances=plan.instances,
                status=outcome,
                time=running.began,
                waited_s=running.waited_s,
                stall_s=running.stall_s,
                moving_s=running.moving_s,
                freed_bytes=plan.freed_bytes if dropped else 0,
                exchanged_bytes=running.exchanged_bytes,
                loaded_bytes=running.loaded_bytes,
                capacity_before=plan.capacity_before,
                capacity_after=sum(self._instances.owners[i].capacity for i in plan.instances),
            )
        )


def _declined(
    now: float, request: TransitionRequest, error: str, decision: Decision, state: ClusterState
) -> SimulatedEvent:
    """No plan was good enough for what was asked for: requests queue instead of a drop."""
    return SimulatedEvent(
        kind=request.kind,
        reason=request.reason,
        error=error,
        decision=decision,
        instances=[s.instance for s in state.instances],
        status=Outcome.DECLINED,
        time=now,
        capacity_before=state.capacity,
        capacity_after=state.capacity,
    )

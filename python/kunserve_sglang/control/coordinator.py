"""Carries plans out by two-phase commit: one epoch a layout, a deadline for every answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import msgspec

from kunserve_sglang.api.events import Event
from kunserve_sglang.control.events import EventLog
from kunserve_sglang.control.hub import ControlHub, NoAnswer
from kunserve_sglang.core import faults
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import TransientError
from kunserve_sglang.core.messages import Abort, Commit, Done, Prepare, Transition, Vote
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.search import slots
from kunserve_sglang.policy.staging import STEPS
from kunserve_sglang.policy.transition_request import Outcome

_POLL_INTERVAL_S = 0.05
"""How often to ask whether what is being fetched ahead is still wanted."""

_ABORT_TIMEOUT_S = 2.0
_AGAIN_S = 0.5


class TransitionRunning(TransientError):
    """Another transition is under way; there is never more than one."""


class Coordinator:
    """One transition at a time; every one ends committed, aborted or failed (invariant 6).

    `last_epoch` is the highest that a plan has had, also one that was given up.
    """

    def __init__(self, hub: ControlHub, config: ClusterConfig, events: EventLog) -> None:
        self._hub = hub
        self._config = config
        self._events = events
        self.last_epoch = 0
        self.running: Event | None = None
        self._decision_s = 2 * config.vote_timeout_s
        self._later: set[asyncio.Task[None]] = set()
        """Members that have still to hear that a transition was given up."""

    def next_epoch(self, known: int) -> int:
        """An epoch above all used so far; `known` is the highest that instances report.

        The plan that takes it may use the few after it for its steps.
        """
        epoch = max(self.last_epoch, known) + 1
        self.last_epoch = epoch + STEPS - 1
        return epoch

    def close(self) -> None:
        """Nobody is told anything any more."""
        for later in self._later:
            later.cancel()

    async def execute(
        self, make_plan: Callable[[], Plan], unwanted: Callable[[Plan], str] = lambda _: ""
    ) -> Event:
        """Plan and run one transition; returns its record.

        What is fetched ahead is given up as soon as `unwanted` has a reason. Raises
        `TransitionRunning` if one is under way, and whatever `make_plan` raises; then nothing has
        been changed and nothing is recorded.
        """
        if self.running is not None:
            raise TransitionRunning(
                f"transition {self.running.epoch} ({self.running.kind}) is still running"
            )
        plan = make_plan()
        event = Event(
            epoch=plan.transition.epoch,
            kind=plan.transition.kind,
            reason=plan.reason,
            instances=plan.instances,
            status=Outcome.RUNNING,
            time=time.time(),
            capacity_before=plan.capacity_before,
            capacity_after=plan.capacity_before,
            decision=plan.decision,
        )
        self.running = event
        started = time.perf_counter()
        try:
            event = await self._run(plan, event, unwanted)
        finally:
            self.running = None
        duration = 1e3 * (time.perf_counter() - started)
        event = msgspec.structs.replace(event, duration_ms=duration)
        faults.at("control.ended")
        self._events.add(event)
        return event

    async def _run(self, plan: Plan, event: Event, unwanted: Callable[[Plan], str]) -> Event:
        for step in plan.steps:
            before = event
            event = await self._step(step, event, lambda: unwanted(plan))
            if event.status is Outcome.COMMITTED:
                continue
            if plan.undo is not None:
                return await self._take_back(plan, plan.undo, event)
            stands = before.status is Outcome.COMMITTED
            if stands and event.status is Outcome.ABORTED and step.grows:
                # The memory is there, but was not handed out: the drop itself stands.
                return msgspec.structs.replace(before, error=event.error)
            return event
        return event

    async def _step(self, step: Transition, event: Event, unwanted: Callable[[], str]) -> Event:
        objections = await self._votes(step)
        if objections:
            reason = "; ".join(objections)
            await self._abort(step, reason)
            return msgspec.structs.replace(event, status=Outcome.ABORTED, error=reason)
        answers = await self._commit(step, unwanted)
        done = [a for a in answers if isinstance(a, Done)]
        failures = [a.error if isinstance(a, Done) else a for a in answers]
        failures = sorted({f for f in failures if f})
        unchanged = all(isinstance(a, Done) and not a.ok for a in answers)
        stats = [a.stats for a in done]
        outcome = Outcome.COMMITTED
        if failures:
            outcome = Outcome.ABORTED if unchanged else Outcome.FAILED
        return msgspec.structs.replace(
            event,
            epoch=step.epoch,
            status=outcome,
            error="; ".join(failures),
            freed_bytes=event.freed_bytes + sum(s.freed_bytes for s in stats),
            loaded_bytes=event.loaded_bytes + sum(s.loaded_bytes for s in stats),
            exchanged_bytes=event.exchanged_bytes + sum(s.sent_kv_bytes for s in stats),
            compacted_slots=event.compacted_slots + sum(s.moved_slots for s in stats),
            stall_ms=max([event.stall_ms, *(s.stall_ms for s in stats)]),
            remap_ms=max([event.remap_ms, *(s.remap_ms for s in stats)]),
            capacity_after=event.capacity_after if failures else slots(step.after),
        )

    async def _take_back(self, plan: Plan, undo: Transition, event: Event) -> Event:
        """A later step could not be done: give up what was fetched, and the room made for it.

        If not even the first step was, the members refuse to undo it, and nothing has to be done.
        """
        await self._abort(plan.steps[0], event.error)
        undone = await self._step(undo, event, lambda: "")
        back = undone.status is Outcome.COMMITTED
        return msgspec.structs.replace(
            event, capacity_after=undone.capacity_after if back else event.capacity_after
        )

    async def _votes(self, step: Transition) -> list[str]:
        """Phase one; returns the reasons against it."""
        timeout = self._config.vote_timeout_s

        async def ask(instance: int) -> str:
            message = Prepare(
                call=self._hub.next_call(), transition=step, decision_s=self._decision_s
            )
            try:
                answer = await self._hub.call(instance, message, timeout)
            except NoAnswer as error:
                return str(error)
            if isinstance(answer, Vote) and answer.ok:
                return ""
            reason = answer.reason if isinstance(answer, Vote) else f"unexpected {answer}"
            return f"instance {instance} refused: {reason}"

        reasons = await asyncio.gather(*(ask(i) for i in step.instances))
        return [r for r in reasons if r]

    async def _commit(self, step: Transition, unwanted: Callable[[], str]) -> list[Done | str]:
        """Phase two; an error text stands for a member that did not answer."""
        deadline = self._config.exchange_timeout_s
        moving = step.live or bool(step.ahead)
        timeout = self._config.transfer_timeout_s if moving else deadline + 5

        async def tell(instance: int) -> Done | str:
            message = Commit(call=self._hub.next_call(), epoch=step.epoch, deadline_s=deadline)
            try:
                # What is decided is decided: even one that is away for a moment has to hear of it.
                answer = await self._hub.call(instance, message, timeout, insist=True)
            except NoAnswer as error:
                return str(error)
            return answer if isinstance(answer, Done) else f"instance {instance}: {answer}"

        answers = asyncio.gather(*(tell(i) for i in step.instances))
        while step.ahead and not answers.done():
            await asyncio.wait([answers], timeout=_POLL_INTERVAL_S)
            if not answers.done() and (reason := unwanted()):
                await self._abort(step, reason)
                break
        return list(await answers)

    async def _abort(self, step: Transition, reason: str) -> None:
        """A member that cannot be told now is told later, and nobody waits for that.

        It gives up by itself after the decision time; until then it serves nobody.
        """

        async def tell(instance: int) -> None:
            message = Abort(call=self._hub.next_call(), epoch=step.epoch, reason=reason)
            try:
                await self._hub.call(instance, message, _ABORT_TIMEOUT_S)
            except NoAnswer:
                later = asyncio.create_task(self._tell_later(instance, message))
                self._later.add(later)
                later.add_done_callback(self._later.discard)

        await asyncio.gather(*(tell(i) for i in step.instances))

    async def _tell_later(self, instance: int, message: Abort) -> None:
        """Even one that counts as gone may only have been cut off, and comes back as it was."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._decision_s
        while (left := deadline - clock()) > 0:
            with contextlib.suppress(NoAnswer):
                await self._hub.call(instance, message, left, insist=True)
                return
            await asyncio.sleep(min(left, _AGAIN_S))

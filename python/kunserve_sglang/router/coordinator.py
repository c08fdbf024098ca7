"""Carries plans out: two phases, an epoch, a deadline for every answer (DESIGN section 5)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from kunserve_sglang.config import ClusterConfig
from kunserve_sglang.errors import TransientError
from kunserve_sglang.messages import Abort, Commit, Done, Prepare, Vote
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.router.events import Event, EventLog, Outcome
from kunserve_sglang.router.hub import ControlHub, NoAnswer


class TransitionRunning(TransientError):
    """Another transition is under way; there is never more than one."""


class Coordinator:
    """One transition at a time; every one ends committed, aborted or failed (invariant 6)."""

    def __init__(self, hub: ControlHub, config: ClusterConfig, events: EventLog) -> None:
        self._hub = hub
        self._config = config
        self._events = events
        self._last_epoch = 0
        self.running: Event | None = None

    def next_epoch(self, known: int) -> int:
        """An epoch above all used so far; `known` is the highest that instances report."""
        self._last_epoch = max(self._last_epoch, known) + 1
        return self._last_epoch

    async def execute(self, make_plan: Callable[[], Plan]) -> Event:
        """Plan and run one transition; returns its record.

        Raises `TransitionRunning` if one is under way, and whatever `make_plan` raises; then
        nothing has been changed and nothing is recorded.
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
            event = await self._run(plan, event)
        finally:
            self.running = None
        duration = 1e3 * (time.perf_counter() - started)
        event = msgspec.structs.replace(event, duration_ms=duration)
        self._events.add(event)
        return event

    async def _run(self, plan: Plan, event: Event) -> Event:
        objections = await self._votes(plan)
        if objections:
            reason = "; ".join(objections)
            await self._abort(plan, reason)
            return msgspec.structs.replace(event, status=Outcome.ABORTED, error=reason)
        answers = await self._commit(plan)
        done = [a for a in answers if isinstance(a, Done)]
        failures = [a.error if isinstance(a, Done) else a for a in answers]
        failures = [f for f in failures if f]
        unchanged = all(isinstance(a, Done) and not a.ok for a in answers)
        stats = [a.stats for a in done]
        return msgspec.structs.replace(
            event,
            status=(
                Outcome.COMMITTED
                if not failures
                else Outcome.ABORTED
                if unchanged
                else Outcome.FAILED
            ),
            error="; ".join(failures),
            freed_bytes=sum(s.freed_bytes for s in stats),
            loaded_bytes=sum(s.loaded_bytes for s in stats),
            exchanged_bytes=sum(s.sent_kv_bytes for s in stats),
            compacted_slots=sum(s.moved_slots for s in stats),
            stall_ms=max((s.stall_ms for s in stats), default=0.0),
            remap_ms=max((s.remap_ms for s in stats), default=0.0),
            capacity_after=event.capacity_before if failures else plan.capacity_after,
        )

    async def _votes(self, plan: Plan) -> list[str]:
        """Phase one; returns the reasons against it."""
        timeout = self._config.vote_timeout_s

        async def ask(instance: int) -> str:
            message = Prepare(
                call=self._hub.next_call(),
                transition=plan.transition,
                decision_s=2 * timeout,
            )
            try:
                answer = await self._hub.call(instance, message, timeout)
            except NoAnswer as error:
                return str(error)
            if isinstance(answer, Vote) and answer.ok:
                return ""
            reason = answer.reason if isinstance(answer, Vote) else f"unexpected {answer}"
            return f"instance {instance} refused: {reason}"

        reasons = await asyncio.gather(*(ask(i) for i in plan.instances))
        return [r for r in reasons if r]

    async def _commit(self, plan: Plan) -> list[Done | str]:
        """Phase two; an error text stands for a member that did not answer."""
        timeout = self._config.exchange_timeout_s

        async def tell(instance: int) -> Done | str:
            message = Commit(
                call=self._hub.next_call(), epoch=plan.transition.epoch, deadline_s=timeout
            )
            try:
                answer = await self._hub.call(instance, message, timeout + 5)
            except NoAnswer as error:
                return str(error)
            return answer if isinstance(answer, Done) else f"instance {instance}: {answer}"

        return list(await asyncio.gather(*(tell(i) for i in plan.instances)))

    async def _abort(self, plan: Plan, reason: str) -> None:
        """Best effort: a member that misses it gives up by itself after the decision time."""

        async def tell(instance: int) -> None:
            message = Abort(call=self._hub.next_call(), epoch=plan.transition.epoch, reason=reason)
            try:
                await self._hub.call(instance, message, 1.0)
            except NoAnswer:
                return

        await asyncio.gather(*(tell(i) for i in plan.instances))

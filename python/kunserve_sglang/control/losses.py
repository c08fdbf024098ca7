"""Groups that have come apart: who is gone for certain, and what the others are told.

What an instance should do follows from what is known now, not from what happened: so a restarted
router goes on where the last one was, and a message that got lost is sent again. The same goes for
a member whose mates have obeyed a decision that it has missed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kunserve_sglang.control.coordinator import Coordinator
from kunserve_sglang.control.hub import ControlHub, NoAnswer
from kunserve_sglang.control.liveness import LivenessState
from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.core.messages import (
    PROTOCOL_VERSION,
    Abort,
    Commit,
    Lost,
    Mode,
    Prepare,
    Transition,
    Vote,
    Welcome,
)
from kunserve_sglang.policy.agreement import Agreement, agreement, catching_up

logger = logging.getLogger(__name__)

_POLL_INTERVAL_S = 0.05
_AGAIN_S = 1.0
"""An instance that waits in the middle of a transition may skip over what it is told."""

_STALE_S = 5.0
"""What is known of an instance may be old by so much: reports get lost, and steps take time."""

_GROWTH_TIMEOUT_S = 10.0

_NOT_THERE = (LivenessState.REFUSED, LivenessState.UNREACHABLE)


class Losses:
    """Tells the members of a group that does not hold together any more to come back alone.

    Where one has only missed that capacities have grown, it is told so instead.
    """

    def __init__(
        self,
        registry: Registry,
        hub: ControlHub,
        coordinator: Coordinator,
        on_gone: Callable[[Instance], None],
    ) -> None:
        self._registry = registry
        self._hub = hub
        self._coordinator = coordinator
        self._on_gone = on_gone
        self._told: dict[int, tuple[int, float]] = {}
        """By instance: the epoch of the layout that it was told of last, and when."""
        self._ahead: dict[tuple[int, int], tuple[tuple[Layout, Layout], float]] = {}
        """By member and mate: layouts that do not go together, and since when that is known."""
        self._fetch_ended: dict[int, float] = {}
        """By instance: when it was told last that its fetch is in vain."""
        self._growing: dict[int, asyncio.Task[None]] = {}
        self._refused: dict[int, Transition] = {}
        """By instance: the growth that it has missed and cannot make up for."""

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(_POLL_INTERVAL_S)
                gone = await self.gone()
                for number in gone & self._registry.instances.keys():
                    self._on_gone(self._registry.instances[number])
                await self._tell(gone)
                await self._end_fetches()
                self._catch_up(tasks)

    async def gone(self) -> set[int]:
        """Those that take no HTTP connections and whose control connection has ended.

        Either alone says little: a server may restart, and a busy or stopped process answers
        nobody but keeps both. One of which nothing at all is heard for long is gone as well: it may
        stand still together with whoever would end it.
        """
        gone = set(self._registry.left)
        for instance in list(self._registry.instances.values()):
            if instance.plain:
                if instance.liveness.state is LivenessState.UNREACHABLE:
                    gone.add(instance.number)
            elif instance.liveness.state is LivenessState.SILENT:
                gone.add(instance.number)
            elif instance.liveness.state in _NOT_THERE:
                hollow = Welcome(version=PROTOCOL_VERSION)  # means nothing to one that knows us
                if not await self._hub.tell(instance.number, hollow):
                    gone.add(instance.number)
        return gone

    # -- coming apart ----------------------------------------------------------------------------

    async def _tell(self, gone: set[int]) -> None:
        now = self._registry.now()
        for instance in list(self._registry.instances.values()):
            missing = self._missing(instance, gone)
            if not missing and instance.mode is not Mode.RECOVERING:
                continue
            if instance.number in gone or instance.status is None:
                continue
            broken = instance.status.layout.epoch
            told, when = self._told.get(instance.number, (-1, 0.0))
            if told == broken and now - when < _AGAIN_S:
                continue
            self._told[instance.number] = broken, now
            if told != broken:
                logger.warning(
                    "instance %d comes back alone: %s of its group are gone",
                    instance.number,
                    sorted(missing),
                )
            epoch = self._coordinator.next_epoch(self._registry.latest_epoch)
            lost = Lost(epoch=epoch, broken=broken, instances=tuple(sorted(missing)))
            await self._hub.tell(instance.number, lost)

    def _missing(self, instance: Instance, gone: set[int]) -> set[int]:
        """Those that `instance` counts on, in its group or for a transition, and should not."""
        if instance.status is None:
            return set()
        group = set(instance.status.layout.ids)
        running = self._coordinator.running
        if running is not None and instance.number in running.instances:
            group |= set(running.instances)
            return {
                n for n in group if n in gone or (n != instance.number and self._has_given_up(n))
            }
        if instance.number in self._refused:
            return group - {instance.number}
        return {n for n in group if n in gone or self._has_left(n, instance.number)}

    def _has_given_up(self, number: int) -> bool:
        """Whether it is without its part of the layout."""
        known = self._registry.instances.get(number)
        return known is not None and known.mode is Mode.RECOVERING

    def _has_left(self, number: int, mate: int) -> bool:
        """Whether it cannot run with `mate`, which counts on it, and will not come back to that."""
        layouts = self._layouts(mate, number)
        if layouts is None:
            self._ahead.pop((mate, number), None)
            return False
        mine, theirs = layouts
        recovering = self._has_given_up(number)
        verdict = agreement(mine, theirs)
        if verdict is Agreement.OVERTAKEN or (recovering and theirs.epoch >= mine.epoch):
            return True
        if verdict is not Agreement.AHEAD and not recovering:
            self._ahead.pop((mate, number), None)
            return False
        now = self._registry.now()
        known, since = self._ahead.get((mate, number), (None, now))
        if known != layouts:
            since = now
        self._ahead[mate, number] = layouts, since
        return now - since > _STALE_S

    def _layouts(self, mine: int, theirs: int) -> tuple[Layout, Layout] | None:
        """By which the two run, as far as is known."""
        one, other = (self._registry.instances.get(n) for n in (mine, theirs))
        if one is None or other is None or one.status is None or other.status is None:
            return None
        return one.status.layout, other.status.layout

    async def _end_fetches(self) -> None:
        """What is fetched for no transition any more only takes memory away."""
        now = self._registry.now()
        for instance in list(self._registry.instances.values()):
            if instance.mode is not Mode.RESTORING or self._in_transition(instance.number):
                self._fetch_ended.pop(instance.number, None)
            elif instance.status and now - self._fetch_ended.get(instance.number, 0.0) > _AGAIN_S:
                self._fetch_ended[instance.number] = now
                epoch = instance.status.layout.epoch
                reason = "the restore has been given up"
                abort = Abort(call=self._hub.next_call(), epoch=epoch, reason=reason)
                await self._hub.tell(instance.number, abort)

    def _in_transition(self, number: int) -> bool:
        running = self._coordinator.running
        return running is not None and number in running.instances

    # -- catching up -----------------------------------------------------------------------------

    def _catch_up(self, tasks: asyncio.TaskGroup) -> None:
        """Whoever has missed a growth makes up for it; meanwhile its group goes on."""
        self._growing = {n: task for n, task in self._growing.items() if not task.done()}
        growths = {n: g for n in self._registry.instances if (g := self._missed_growth(n))}
        self._refused = {n: g for n, g in self._refused.items() if growths.get(n) == g}
        for number, growth in growths.items():
            if number not in self._growing and number not in self._refused:
                self._growing[number] = tasks.create_task(self._grow(number, growth))

    def _missed_growth(self, number: int) -> Transition | None:
        status = self._registry.instances[number].status
        if status is None or self._in_transition(number):
            return None
        for mate in status.layout.ids:
            layouts = self._layouts(number, mate)
            if layouts is not None and agreement(*layouts) is Agreement.BEHIND:
                return catching_up(*layouts)
        return None

    async def _grow(self, number: int, growth: Transition) -> None:
        """Both phases for one member: all others have been through them."""
        hub = self._hub
        timeout = _GROWTH_TIMEOUT_S
        prepare = Prepare(call=hub.next_call(), transition=growth, decision_s=timeout)
        commit = Commit(call=hub.next_call(), epoch=growth.epoch, deadline_s=timeout)
        try:
            vote = await hub.call(number, prepare, timeout)
            if isinstance(vote, Vote) and vote.ok:
                await hub.call(number, commit, timeout, insist=True)
                logger.info("instance %d has caught up with epoch %d", number, growth.epoch)
            else:
                logger.warning("instance %d cannot catch up: %s", number, vote)
                self._refused[number] = growth
        except NoAnswer as error:
            logger.debug("%s", error)  # looked at again, for as long as it is there

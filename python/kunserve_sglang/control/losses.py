"""Groups that have come apart: who is gone for certain, and what the others are told.

What an instance should do follows from what is known now, not from what happened: so a restarted
router goes on where the last one was, and a message that got lost is sent again.
"""

from __future__ import annotations

import asyncio
import logging
import time

from kunserve_sglang.control.coordinator import Coordinator
from kunserve_sglang.control.hub import ControlHub
from kunserve_sglang.control.liveness import LivenessState
from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.core.messages import PROTOCOL_VERSION, Lost, Mode, Welcome

logger = logging.getLogger(__name__)

_POLL_INTERVAL_S = 0.05
_AGAIN_S = 1.0
"""An instance that waits in the middle of a transition may skip over what it is told."""


class Losses:
    """Tells the survivors of a group that has lost a member to come back alone."""

    def __init__(self, registry: Registry, hub: ControlHub, coordinator: Coordinator) -> None:
        self._registry = registry
        self._hub = hub
        self._coordinator = coordinator
        self._told: dict[int, tuple[int, float]] = {}
        """By instance: the epoch of the layout that it was told of last, and when."""

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(_POLL_INTERVAL_S)
            gone = await self.gone()
            for number in gone:
                self._hub.give_up(number)
            await self._tell(gone)

    async def gone(self) -> set[int]:
        """Those whose HTTP port refuses and whose control connection has ended.

        Either alone says little: a server may restart, and a busy or stopped process answers
        nobody but keeps both.
        """
        gone = set(self._registry.left)
        for instance in list(self._registry.instances.values()):
            if instance.liveness.state is LivenessState.REFUSED and not instance.plain:
                hollow = Welcome(version=PROTOCOL_VERSION)  # means nothing to one that knows us
                if not await self._hub.tell(instance.number, hollow):
                    gone.add(instance.number)
        return gone

    async def _tell(self, gone: set[int]) -> None:
        now = time.monotonic()
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
        if running is None:
            return {n for n in group if n in gone or self._has_left(n, instance.number)}
        if instance.number in running.instances:
            group |= set(running.instances)
        return group & gone

    def _has_left(self, number: int, mate: int) -> bool:
        """Whether it runs by a layout without `mate`, or has given up one with it."""
        known = self._registry.instances.get(number)
        if known is None or known.status is None or number == mate:
            return False
        return known.status.mode is Mode.RECOVERING or mate not in known.status.layout.ids

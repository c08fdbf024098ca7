"""Taking an instance out of a running cluster: no new requests, its group apart, then its end."""

from __future__ import annotations

import asyncio
import logging
import time

from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.coordinator import TransitionRunning
from kunserve_sglang.control.registry import Instance
from kunserve_sglang.core.errors import TransientError
from kunserve_sglang.policy.transition_request import Outcome

logger = logging.getLogger(__name__)

_POLL_INTERVAL_S = 0.05


class NotDrained(TransientError):
    """The instance cannot leave now, and takes requests as before."""


class DrainTimeout(NotDrained):
    """Requests were still under way when the time was over."""


class Draining:
    """Drains instances and plain workers; each ends in bounded time, gone or back in service."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control

    async def drain(self, instance: Instance, timeout_s: float, *, migrate: bool = False) -> None:
        """Let `instance` go; its requests may take `timeout_s` seconds to end.

        Transitions under way may take that time as well. With `migrate` other instances go on with
        those requests that can be resumed.

        Raises `NotDrained`, and `NoPlan` or `TransitionRunning` if its group cannot be taken apart;
        then it takes requests as before. One that is lost is forgotten at once.
        """
        deadline = time.monotonic() + timeout_s
        if instance.draining:
            raise NotDrained(f"instance {instance.number} is draining already")
        instance.draining = True
        try:
            if migrate:
                self._control.front.move(instance)
            await self._split_group(instance, deadline)
            await self._wait_until_idle(instance, timeout_s, migrate=migrate)
        except BaseException:
            instance.draining = False
            raise
        await self._control.let_go(instance)
        logger.info("instance %d at %s has left", instance.number, instance.url)

    async def _split_group(self, instance: Instance, deadline: float) -> None:
        """Others run with its layers, and it with theirs: everybody becomes independent first.

        It may be about to join a group, too: what is under way comes to its end.
        """
        while self._in_group(instance):
            try:
                event = await self._control.split(instance.number)
            except TransitionRunning:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(_POLL_INTERVAL_S)
                continue
            if event.status is not Outcome.COMMITTED:
                raise NotDrained(
                    f"the group of instance {instance.number} could not be taken apart: "
                    f"{event.error}"
                )
            return

    def _in_group(self, instance: Instance) -> bool:
        """Whether it is in one, or in a transition that may bring it into one."""
        if instance.liveness.lost or instance.status is None:
            return False
        running = self._control.coordinator.running
        in_transition = running is not None and instance.number in running.instances
        return in_transition or instance.status.layout.cooperative

    async def _wait_until_idle(
        self, instance: Instance, timeout_s: float, *, migrate: bool
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not (instance.idle or instance.liveness.lost):
            if time.monotonic() >= deadline:
                raise DrainTimeout(
                    f"{instance.in_flight} requests are still under way on instance "
                    f"{instance.number} after {timeout_s:g} s; it takes new ones again"
                )
            await asyncio.sleep(_POLL_INTERVAL_S)
            if migrate:  # some were on their way, and others may be able to take more by now
                self._control.front.move(instance)

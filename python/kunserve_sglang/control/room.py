"""Tells every instance what to admit, for as long as that may change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kunserve_sglang.control.hub import ControlHub
from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.core.messages import Attainable
from kunserve_sglang.policy.controller import TELL_INTERVAL_S

_REPEAT_EVERY = 10
"""Rounds: what was told and got lost is told again."""


class Room:
    """Instances accept what is larger than they are as long as a drop, or a peer, has room for it.

    `attainable` says how many slots each could get now, and how many requests it is to run: it
    changes with the policy, with limits, with the load, and with who is there.
    """

    def __init__(
        self,
        registry: Registry,
        hub: ControlHub,
        attainable: Callable[[], dict[int, Attainable]],
    ) -> None:
        self._registry = registry
        self._hub = hub
        self._attainable = attainable
        self._told: dict[int, tuple[Instance, Attainable]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        rounds = 0
        while True:
            await self.tell()
            await asyncio.sleep(TELL_INTERVAL_S)
            rounds += 1
            if rounds % _REPEAT_EVERY == 0:
                self._told.clear()

    async def tell(self) -> dict[int, Attainable]:
        """Tell those for whom it has changed; returns what holds for all."""
        attainable = self._attainable()
        for number, told in attainable.items():
            instance = self._registry.instances.get(number)
            # A new process under an old number has been told nothing.
            if instance is None or self._told.get(number) == (instance, told):
                continue
            if await self._hub.tell(number, told):
                self._told[number] = instance, told
        return attainable

"""What one router leaves to the next: all that instances cannot say by themselves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from kunserve_sglang.api.types import Policy
from kunserve_sglang.control.leases import SavedLeases
from kunserve_sglang.control.registry import Registry
from kunserve_sglang.core.messages import Hello
from kunserve_sglang.core.private_files import write_private
from kunserve_sglang.policy.controller import WATCH_INTERVAL_S

logger = logging.getLogger(__name__)


class SavedInstance(msgspec.Struct, frozen=True, kw_only=True):
    """One of ours, as it has introduced itself; `served` says whether it has ever served."""

    hello: Hello
    served: bool


class SavedWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A plain SGLang server; `key` is as in `control.registry.Instance`."""

    number: int
    url: str
    key: str | None
    served: bool


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """What has been set, who is here, who has left, and who makes the cluster complete.

    `last_epoch` is that of the latest plan: members refuse one that has been decided against, and
    report only those decided for.
    """

    policy: Policy
    instances: tuple[SavedInstance, ...]
    left: tuple[Hello, ...]
    expected: tuple[int, ...]
    workers: tuple[SavedWorker, ...]
    next_worker: int
    leases: SavedLeases
    last_epoch: int = 0


def state_to_save(registry: Registry, policy: Policy, last_epoch: int) -> SavedState:
    known = registry.instances.values()
    return SavedState(
        policy=policy,
        instances=tuple(
            SavedInstance(hello=i.hello, served=i.liveness.served)
            for i in known
            if i.hello is not None
        ),
        left=tuple(registry.left_by.values()),
        expected=tuple(sorted(registry.expected)),
        workers=tuple(
            SavedWorker(number=i.number, url=i.url, key=i.key, served=i.liveness.served)
            for i in known
            if i.hello is None
        ),
        next_worker=registry.next_worker,
        leases=registry.leases.saved(),
        last_epoch=last_epoch,
    )


def take_over(registry: Registry, saved: SavedState) -> None:
    """Fill a new registry. What instances do now they will say; who is gone has to be seen."""
    registry.leases.take_over(saved.leases, registry.now())
    registry.left_by = {hello.instance: hello for hello in saved.left}
    for instance in saved.instances:
        registry.hello(instance.hello)
        known = registry.instances[instance.hello.instance]
        known.greeted, known.liveness.served = False, instance.served
    for worker in saved.workers:
        known = registry.add_worker(worker.url, worker.key, worker.number)
        known.liveness.served = worker.served
    registry.next_worker = saved.next_worker
    registry.expected = set(saved.expected)


class StateFile:
    """Holds one `SavedState`, for the eyes of its owner only: there are keys in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: SavedState | None = None

    def read(self) -> SavedState | None:
        """None if there is none, or none that can be read, which is logged."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=SavedState)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            logger.error("what the last router has left is unreadable: %s: %s", self._path, error)
            return None

    def keep(self, state: SavedState) -> None:
        """Write it down if it has changed."""
        if state == self._kept:
            return
        self._kept = state
        try:
            write_private(self._path, msgspec.json.encode(state))
        except OSError as error:
            # A full disk must not end the router; the next change is tried again.
            logger.error("a router that comes after this one will miss things: %s", error)

    async def follow(self, observe: Callable[[], SavedState]) -> None:
        """Keep what `observe` returns, until cancelled."""
        while True:
            self.keep(observe())
            await asyncio.sleep(WATCH_INTERVAL_S)

"""What the router knows of its instances."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from operator import attrgetter

from kunserve_sglang.control.liveness import Liveness, LivenessState
from kunserve_sglang.core.messages import Hello, Mode, Status
from kunserve_sglang.policy.state import ClusterState, InstanceState

_SUSPECT_S = 3.0
"""A process that ends closes its control connection first, and its HTTP port soon after."""

FIRST_WORKER = 1000
"""Ids of plain SGLang servers begin here, above every number that a launcher gives."""


@dataclass(slots=True)
class Instance:
    """One instance; `in_flight` counts our requests.

    A `draining` one gets no new requests and is in no plan: it is about to leave.

    A plain SGLang server has no agent: it never says `hello`, nor what it does. `capacity` is in
    token slots, as it was when the instance began to serve; 0 while that is unknown.
    """

    number: int
    url: str
    hello: Hello | None = None
    capacity: int = 0
    status: Status | None = None
    liveness: Liveness = field(default_factory=lambda: Liveness(time.monotonic()))
    draining: bool = False
    in_flight: int = 0

    @property
    def plain(self) -> bool:
        """Whether it is an SGLang server without an agent, which can take no part in a drop."""
        return self.hello is None

    @property
    def mode(self) -> Mode:
        if self.plain:
            return Mode.INDEPENDENT if self.liveness.alive else Mode.DEAD
        if self.liveness.lost or self.status is None:
            return Mode.DEAD
        return self.status.mode

    @property
    def available(self) -> bool:
        """Whether it can take requests."""
        serving = self.liveness.state is LivenessState.SERVING
        return serving and not self.draining and not self.stalled

    @property
    def stalled(self) -> bool:
        """Whether its requests wait, could run, and do not: then more of them would only hang."""
        return self.status is not None and self.status.load.stalled

    @property
    def idle(self) -> bool:
        """Whether it has no request, neither from us nor, as far as it says, from others."""
        load = self.status.load if self.status else None
        return not self.in_flight and (load is None or not load.running + load.waiting)


_by_number = attrgetter("number")


class Registry:
    """The instances that have said hello and the plain servers that were added, by number.

    `expected` are those that make the cluster complete: what is started with the router or has
    come since, and has not left in good order.
    """

    def __init__(self, launched: int = 0) -> None:
        """`launched` instances are started with the router, under the first numbers."""
        self.instances: dict[int, Instance] = {}
        self.expected = set(range(launched))
        self.suspected_until = 0.0
        self._left: dict[int, Hello] = {}
        self._next_worker = itertools.count(FIRST_WORKER)
        self._next_instance = itertools.count(launched)

    def hello(self, message: Hello) -> bool:
        """An instance greets; false if this very process has been told to leave.

        One with a new address is a new process under an old number.
        """
        if self._left.get(message.instance) == message:
            return False
        known = self.instances.get(message.instance)
        if known is None or known.hello != message:
            self.expected.add(message.instance)
            self.instances[message.instance] = Instance(
                message.instance, message.url, message, message.capacity
            )
        else:
            known.liveness.heard(time.monotonic())
        return True

    def new_number(self) -> int | None:
        """For an instance that is to join: one that no other has had; None if there is none."""
        for number in self._next_instance:
            if number >= FIRST_WORKER:
                return None
            if number not in self.instances:
                return number
        return None

    def add_worker(self, url: str) -> Instance:
        """A plain SGLang server, under a number that no other has had."""
        worker = Instance(next(self._next_worker), url)
        self.instances[worker.number] = worker
        self.expected.add(worker.number)
        return worker

    def forget(self, instance: Instance) -> None:
        """It has left; a new process may come under its number."""
        self.expected.discard(instance.number)
        if instance.hello is not None:
            self._left[instance.number] = instance.hello
        if self.instances.get(instance.number) is instance:
            del self.instances[instance.number]

    @property
    def left(self) -> set[int]:
        """The numbers of instances that were here and are not any more."""
        return self._left.keys() - self.instances.keys()

    @property
    def latest_epoch(self) -> int:
        """The highest that an instance has reported."""
        known = self.instances.values()
        return max((i.status.epoch for i in known if i.status is not None), default=0)

    def with_agent(self) -> set[int]:
        """The numbers of KunServe's own instances."""
        return {number for number, instance in self.instances.items() if not instance.plain}

    def status(self, message: Status) -> None:
        known = self.instances.get(message.instance)
        if known is not None:
            known.status = message
            known.liveness.reports(time.monotonic())

    def suspect(self) -> None:
        """Somebody's control connection has ended: look who is still there, for a while."""
        self.suspected_until = time.monotonic() + _SUSPECT_S

    def mark_silent(self) -> None:
        """Instances that have not been heard of for long are lost until they speak again."""
        now = time.monotonic()
        for instance in self.instances.values():
            if not instance.plain:
                instance.liveness.check_silence(now)

    def available(self) -> list[Instance]:
        """Instances that can take requests, by number."""
        return sorted([i for i in self.instances.values() if i.available], key=_by_number)

    def snapshot(self, *, draining: bool = False) -> ClusterState:
        """The cluster for the policies: every live instance that has reported.

        Plain servers are none of theirs: they have no parameters to share. Nor are those that have
        lost their group, and have not got all layers back. Those that are
        `draining` are about to be gone, and matter only to whoever takes their groups apart.
        """
        return ClusterState(
            instances=tuple(
                InstanceState(
                    instance=i.number,
                    address=i.hello.data_address,
                    memory=i.hello.memory,
                    layout=i.status.layout,
                    load=i.status.load,
                    costs=i.hello.costs,
                )
                for i in sorted(self.instances.values(), key=lambda i: i.number)
                if i.hello is not None and i.status is not None and not i.liveness.lost
                if i.mode is not Mode.RECOVERING
                if draining or not i.draining
            )
        )

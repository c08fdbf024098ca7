"""What the router knows of its instances."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from kunserve_sglang.control.leases import Leases
from kunserve_sglang.control.liveness import Liveness, LivenessState
from kunserve_sglang.core.identity import ModelIdentity
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

    `key` is shown to it in place of any other, `""` for none at all; with None, clients' keys and
    those of the cluster go there. With `greeted` it has met this router, and not only one before.

    A plain SGLang server has no agent: it never says `hello`, nor what it does. `capacity` is in
    token slots, as it was when the instance began to serve; 0 while that is unknown.
    """

    number: int
    url: str
    liveness: Liveness
    hello: Hello | None = None
    capacity: int = 0
    status: Status | None = None
    draining: bool = False
    in_flight: int = 0
    key: str | None = None
    greeted: bool = True

    @property
    def plain(self) -> bool:
        """Whether it is an SGLang server without an agent, which can take no part in a drop."""
        return self.hello is None

    def is_news(self, status: Status) -> bool:
        """Whether it is of this very process, and later than what is known."""
        if self.hello is None or status.process != self.hello.process:
            return False
        return self.status is None or not status.number or status.number > self.status.number

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
        # As it runs for every instance with every request, it asks no other property.
        if self.draining or self.liveness.state is not LivenessState.SERVING:
            return False
        return self.status is None or not self.status.load.stalled

    @property
    def stalled(self) -> bool:
        """Whether its requests wait, could run, and do not: then more of them would only hang."""
        return self._says_stalled or self.quiet

    @property
    def quiet(self) -> bool:
        """Whether its scheduler has said nothing for long: it stands still, or is in a long step.

        While it reads layers from the checkpoint, it is silent for good reason.
        """
        return self.liveness.quiet and self.status is not None and self.mode is not Mode.RECOVERING

    @property
    def _says_stalled(self) -> bool:
        return self.status is not None and self.status.load.stalled

    @property
    def idle(self) -> bool:
        """Whether it has no request, neither from us nor, as far as it says, from others."""
        load = self.status.load if self.status else None
        return not self.in_flight and (load is None or not load.running + load.waiting)


class Registry:
    """The instances that have said hello and the plain servers that were added, by number.

    `instances` are in the order of their numbers.
    `expected` are those that make the cluster complete: what is started with the router or has
    come since, and has not left in good order.
    """

    def __init__(
        self,
        launched: int = 0,
        model: ModelIdentity | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`launched` instances are started with the router, under the first numbers, to serve
        `model`. `now` is the clock of all that is said here of times.
        """
        self.now = now
        self.instances: dict[int, Instance] = {}
        self.expected = set(range(launched))
        self.suspected_until = 0.0
        self.left_by: dict[int, Hello] = {}
        """By number: how those introduced themselves that have left."""
        self.next_worker = FIRST_WORKER
        self.leases = Leases(launched, FIRST_WORKER, model)

    def hello(self, message: Hello) -> bool:
        """An instance greets; false if this very process has been told to leave.

        One with a new address is a new process under an old number.
        """
        if self.left_by.get(message.instance) == message:
            return False
        self.leases.use(message.instance)
        known = self.instances.get(message.instance)
        if known is None or known.hello != message:
            self.expected.add(message.instance)
            self._add(
                Instance(
                    message.instance,
                    message.url,
                    Liveness(self.now()),
                    message,
                    message.capacity,
                )
            )
        else:
            known.liveness.speaks(self.now())
            known.greeted = True
        return True

    def new_number(self, model: ModelIdentity) -> int | None:
        """For an instance that is to join and to serve `model`; None if there is none."""
        return self.leases.take(model, self.now(), self.instances)

    def add_worker(self, url: str, key: str | None = None, number: int | None = None) -> Instance:
        """A plain SGLang server, under a number that no other has had, or that it has already."""
        number = self.next_worker if number is None else number
        self.next_worker = max(self.next_worker, number + 1)
        worker = Instance(number, url, Liveness(self.now()), key=key)
        self._add(worker)
        self.expected.add(number)
        return worker

    def _add(self, instance: Instance) -> None:
        self.instances[instance.number] = instance
        in_order = sorted(self.instances.items())
        self.instances.clear()  # and not another dictionary: this one is known to others
        self.instances.update(in_order)

    def forget(self, instance: Instance) -> None:
        """It has left; a new process may come under its number."""
        self.expected.discard(instance.number)
        self.leases.give_back(instance.number)
        if instance.hello is not None:
            self.left_by[instance.number] = instance.hello
        if self.instances.get(instance.number) is instance:
            del self.instances[instance.number]

    @property
    def left(self) -> set[int]:
        """The numbers of instances that were here and are not any more."""
        return self.left_by.keys() - self.instances.keys()

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
        if known is not None and known.is_news(message):
            known.status = message
            known.liveness.reports(self.now())

    def suspect(self) -> None:
        """Somebody's control connection has ended: look who is still there, for a while."""
        self.suspected_until = self.now() + _SUSPECT_S

    def mark_silent(self) -> None:
        """Instances that have not been heard of for long are lost until they speak again."""
        now = self.now()
        for instance in self.instances.values():
            if not instance.plain:
                instance.liveness.check_silence(now)

    def available(self) -> list[Instance]:
        """Instances that can take requests, by number; quiet ones only if all are."""
        available = [i for i in self.instances.values() if i.available]
        return [i for i in available if not i.quiet] or available

    def awaited(self, *, doubtful: bool = False) -> bool:
        """Whether one that takes no requests now is going to: what has died is started again.

        Nobody starts plain servers for us. With `doubtful`, one that seems to be well may have died
        just now.
        """
        return any(
            (doubtful or not i.available) and i.number in self.expected
            for i in self.instances.values()
            if not (i.plain or i.draining)
        )

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
                    host=i.hello.host,
                )
                for i in self.instances.values()
                if i.hello is not None and i.status is not None and not i.liveness.lost
                if i.mode is not Mode.RECOVERING
                if draining or not i.draining
            )
        )

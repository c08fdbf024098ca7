"""What the router knows of its instances."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

from kunserve_sglang.messages import Hello, Mode, Status
from kunserve_sglang.policy.state import ClusterState, InstanceState

_SILENT_AFTER_S = 60.0
"""A status record comes with every step; a step of a large prefill on a CPU takes seconds."""


FIRST_WORKER = 1000
"""Ids of plain SGLang servers begin here, above every number that a launcher gives."""


@dataclass(slots=True)
class Instance:
    """One instance. `serving` once its HTTP server answers; `in_flight` counts our requests.

    A plain SGLang server has no agent: it never says `hello`, nor what it does. `capacity` is in
    token slots, as it was when the instance began to serve; 0 while that is unknown.
    """

    number: int
    url: str
    hello: Hello | None = None
    capacity: int = 0
    status: Status | None = None
    seen: float = field(default_factory=time.monotonic)
    serving: bool = False
    lost: str = ""
    in_flight: int = 0

    @property
    def plain(self) -> bool:
        """Whether it is an SGLang server without an agent, which can take no part in a drop."""
        return self.hello is None

    @property
    def mode(self) -> Mode:
        if self.plain:
            return Mode.INDEPENDENT if self.available else Mode.DEAD
        if self.lost or self.status is None:
            return Mode.DEAD
        return self.status.mode

    @property
    def available(self) -> bool:
        return self.serving and not self.lost


class Registry:
    """All instances that ever said hello, and the plain servers that were added, by number."""

    def __init__(self) -> None:
        self.instances: dict[int, Instance] = {}
        self._next_worker = itertools.count(FIRST_WORKER)

    def hello(self, message: Hello) -> None:
        """An instance greets; one with a new address is a new process under an old number."""
        known = self.instances.get(message.instance)
        if known is None or known.hello != message:
            self.instances[message.instance] = Instance(
                message.instance, message.url, message, message.capacity
            )
        else:
            known.seen = time.monotonic()

    def add_worker(self, url: str) -> Instance:
        """A plain SGLang server, under a number that no other has had."""
        worker = Instance(next(self._next_worker), url)
        self.instances[worker.number] = worker
        return worker

    def remove_worker(self, number: int) -> None:
        """No new requests for this plain server; those under way go on."""
        del self.instances[number]

    def with_agent(self) -> set[int]:
        """The numbers of KunServe's own instances."""
        return {number for number, instance in self.instances.items() if not instance.plain}

    def status(self, message: Status) -> None:
        known = self.instances.get(message.instance)
        if known is not None:
            known.status = message
            known.seen = time.monotonic()
            known.lost = ""

    def mark_silent(self) -> None:
        """Instances that have not been heard of for long are lost until they speak again."""
        now = time.monotonic()
        for instance in self.instances.values():
            if instance.plain or instance.lost:
                continue
            if now - instance.seen > _SILENT_AFTER_S:
                instance.lost = f"silent for {_SILENT_AFTER_S:.0f} s"

    def available(self) -> list[Instance]:
        """Instances that can take requests, by number."""
        return sorted((i for i in self.instances.values() if i.available), key=lambda i: i.number)

    def snapshot(self) -> ClusterState:
        """The cluster for the policies: every live instance that has reported.

        Plain servers are none of theirs: they have no parameters to share.
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
                if i.hello is not None and i.status is not None and not i.lost
            )
        )

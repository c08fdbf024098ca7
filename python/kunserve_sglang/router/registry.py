"""What the router knows of its instances."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from kunserve_sglang.messages import Hello, Mode, Status
from kunserve_sglang.policy.state import ClusterState, InstanceState

_SILENT_AFTER_S = 60.0
"""A status record comes with every step; a step of a large prefill on a CPU takes seconds."""


@dataclass(slots=True)
class Instance:
    """One instance. `serving` once its HTTP server answers; `in_flight` counts our requests."""

    hello: Hello
    status: Status | None = None
    seen: float = field(default_factory=time.monotonic)
    serving: bool = False
    lost: str = ""
    in_flight: int = 0

    @property
    def number(self) -> int:
        return self.hello.instance

    @property
    def mode(self) -> Mode:
        if self.lost or self.status is None:
            return Mode.DEAD
        return self.status.mode

    @property
    def available(self) -> bool:
        return self.serving and not self.lost


class Registry:
    """All instances that ever said hello, by number."""

    def __init__(self) -> None:
        self.instances: dict[int, Instance] = {}

    def hello(self, message: Hello) -> None:
        """An instance greets; one with a new address is a new process under an old number."""
        known = self.instances.get(message.instance)
        if known is None or known.hello != message:
            self.instances[message.instance] = Instance(message)
        else:
            known.seen = time.monotonic()

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
            if now - instance.seen > _SILENT_AFTER_S and not instance.lost:
                instance.lost = f"silent for {_SILENT_AFTER_S:.0f} s"

    def available(self) -> list[Instance]:
        """Instances that can take requests, by number."""
        return sorted((i for i in self.instances.values() if i.available), key=lambda i: i.number)

    def snapshot(self) -> ClusterState:
        """The cluster for the policies: every live instance that has reported."""
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
                if i.status is not None and not i.lost
            )
        )

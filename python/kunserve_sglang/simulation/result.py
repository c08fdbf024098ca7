"""What a simulation tells: requests, transitions, and the cluster over time."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.decision import Decision
from kunserve_sglang.policy.transition_request import Outcome
from kunserve_sglang.simulation.job import Job


class SimulatedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A transition. Times are simulated seconds; capacities are slots of its members.

    One that was declined has never begun: no plan was good enough, and `error` says why.

    Over all its steps, `waited_s` is from when members were asked to stop until all of them stood
    still, `stall_s` for how long they did, and `moving_s` how long bytes moved while they served.
    """

    kind: TransitionKind
    reason: str
    instances: list[int]
    status: Outcome
    time: float
    waited_s: float = 0.0
    stall_s: float = 0.0
    moving_s: float = 0.0
    freed_bytes: int = 0
    exchanged_bytes: int = 0
    loaded_bytes: int = 0
    capacity_before: int
    capacity_after: int
    error: str = ""
    decision: Decision | None = None


@dataclass(frozen=True, slots=True)
class ClusterSample:
    """All instances together at one moment."""

    at_s: float
    running: int
    waiting: int
    slots_used: int
    slots_capacity: int
    demand: int
    cooperative: int


@dataclass(slots=True)
class SimulationResult:
    """One simulated run.

    `refused` requests never fit an instance; `wall_s`, `cpu_s` and `steps` say what the simulation
    itself took. `cooperative_s` sums up the seconds that instances spent in groups.
    """

    instances: int
    policy: str
    jobs: list[Job]
    refused: int = 0
    duration_s: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    steps: int = 0
    cooperative_s: float = 0.0
    retractions: int = 0
    capacity: int = 0
    events: list[SimulatedEvent] = field(default_factory=list)
    samples: list[ClusterSample] = field(default_factory=list)

    def committed(self, kind: TransitionKind) -> list[SimulatedEvent]:
        return [e for e in self.events if e.kind is kind and e.status is Outcome.COMMITTED]

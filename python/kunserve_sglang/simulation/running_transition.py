"""What a transition moves, and how far it is: its steps, and the phases of each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec

from kunserve_sglang.core.layout import Layout, MemoryProfile, kv_moves, parameter_loads
from kunserve_sglang.core.messages import Transition
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.simulation.cluster_profile import Profile

BACKGROUND_SHARE = 0.1
"""As in `instance.agent`: the part of the time that goes into what nobody waits for."""


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes over all members, and the seconds that they take if nothing else goes on."""

    exchanged_bytes: int = 0
    loaded_bytes: int = 0
    seconds: float = 0.0


def cost_of(
    before: Sequence[Layout],
    after: Sequence[Layout],
    used: Mapping[int, int],
    memory: MemoryProfile,
    profile: Profile,
) -> Cost:
    """`used`: slots that each owner's requests hold.

    KV and parameters travel one after the other; every instance sends and receives at once, so the
    one with the most bytes in one direction decides.
    """
    row = memory.key_row_bytes + memory.value_row_bytes
    kv_out: Counter[int] = Counter()
    kv_in: Counter[int] = Counter()
    for move in kv_moves(before, after):
        nbytes = used[move.owner] * row * len(move.layers)
        kv_out[move.source] += nbytes
        kv_in[move.target] += nbytes
    parameters_out: Counter[int] = Counter()
    parameters_in: Counter[int] = Counter()
    for load in parameter_loads(before, after):
        parameters_out[load.source] += profile.layer_bytes
        parameters_in[load.target] += profile.layer_bytes
    links = profile.links
    return Cost(
        exchanged_bytes=kv_out.total(),
        loaded_bytes=parameters_out.total(),
        seconds=_most(kv_out, kv_in) / links.exchange_bytes_per_s
        + _most(parameters_out, parameters_in) / links.parameters_bytes_per_s,
    )


def _most(*directions: Counter[int]) -> int:
    return max((max(d.values(), default=0) for d in directions), default=0)


class Phase(StrEnum):
    """Of a step: members come to rest one by one, stand still, and serve while bytes move."""

    STOPPING = "stopping"
    STANDING = "standing"
    MOVING = "moving"


class RunningTransition:
    """A plan on its way. `due` is when its phase ends; infinite until all members have stopped."""

    def __init__(self, plan: Plan, now: float) -> None:
        self.plan = plan
        self.steps = plan.steps
        self.number = 0
        self.began = now
        self.phase = Phase.STOPPING
        self.due = math.inf
        self.waited_s = self.stall_s = self.moving_s = 0.0
        self.exchanged_bytes = self.loaded_bytes = 0
        self._since = now
        self._cost = Cost()
        self._left_s = 0.0
        self._share = 1.0

    @property
    def step(self) -> Transition:
        return self.steps[self.number]

    @property
    def in_background(self) -> bool:
        """Whether the bytes of this step move while its members serve."""
        return self.step.live or bool(self.step.ahead)

    def stop(self, now: float) -> None:
        """The step begins: members are asked to stop."""
        self.phase = Phase.STOPPING
        self.due = math.inf
        self._since = now

    def rested(self, now: float) -> None:
        """All members stand still."""
        self.waited_s += now - self._since
        self._since = now

    def stand(
        self, now: float, used: Mapping[int, int], memory: MemoryProfile, profile: Profile
    ) -> None:
        """All members agree, with `used` slots held by each owner's requests."""
        step = self.step
        if step.ahead:
            self._cost = cost_of(step.after, step.ahead, used, memory, profile)
        elif self.number == 0:
            self._cost = cost_of(step.before, step.after, used, memory, profile)
        else:
            self._cost = Cost()  # it has been fetched ahead
        self.phase = Phase.STANDING
        standing = profile.links.transition_ms / 1e3
        self.due = now + standing + (0.0 if self.in_background else self._cost.seconds)

    def serve(self, now: float) -> None:
        """Members have stood still until now, and go on."""
        self.stall_s += now - self._since
        self._since = now
        self.phase = Phase.MOVING
        self._left_s = self._cost.seconds if self.in_background else 0.0
        self._share = 1.0
        self.due = now + self._left_s

    def pace(self, now: float, *, busy: bool) -> None:
        """Members that have work to do take their time with what is fetched ahead.

        The KV of a drop does not wait: memory does, for the rows to leave.
        """
        self._move(now)
        self._share = BACKGROUND_SHARE if busy and self.step.ahead else 1.0
        self.due = now + self._left_s / self._share

    def arrived(self, now: float) -> None:
        """All bytes of the step are where they belong."""
        self._move(now)
        self.exchanged_bytes += self._cost.exchanged_bytes
        self.loaded_bytes += self._cost.loaded_bytes

    def _move(self, now: float) -> None:
        elapsed = now - self._since
        self._since = now
        self.moving_s += elapsed
        self._left_s = max(0.0, self._left_s - elapsed * self._share)

"""Router and simulator do the same with one controller: what one has done, the other repeats."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sglang.api.events import Event
from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.control_socket import ControlSocket
from kunserve_sglang.core.choices import DispatchPolicy, OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import TransientError
from kunserve_sglang.core.messages import Transition, TransitionKind
from kunserve_sglang.core.transports import ExchangeMode
from kunserve_sglang.policy.controller import Controller
from kunserve_sglang.policy.decision import Decision
from kunserve_sglang.policy.planner import Plan
from kunserve_sglang.policy.state import ClusterState
from kunserve_sglang.policy.transition_request import (
    Outcome,
    RestoreRequest,
    TransitionRequest,
)
from kunserve_sglang.simulation import SimulatedCluster
from kunserve_sglang.simulation.traces import TraceRow
from tests.support.simulated import BURST, loads, profile, slow


class Call(NamedTuple):
    """A call of the controller: what it was told, and what it said."""

    name: str
    now: float
    state: ClusterState | None
    said: object


class Recorder(Controller):
    """Remembers all calls, but for epochs, which everybody counts in a way of their own."""

    def __init__(self, config: ClusterConfig) -> None:
        super().__init__(config)
        self.calls: list[Call] = []
        self._now = 0.0

    def decide(self, now: float, state: ClusterState) -> TransitionRequest | None:
        self._now = now
        request = super().decide(now, state)
        self.calls.append(Call("decide", now, state, request))
        return request

    def in_steps(self, plan: Plan, state: ClusterState) -> Plan:
        plan = super().in_steps(plan, state)
        steps = [(step.kind, placement(step)) for step in plan.steps]
        self.calls.append(Call("in_steps", self._now, None, steps))
        return plan

    def unwanted(self, plan: Plan, state: ClusterState) -> str:
        reason = super().unwanted(plan, state)
        self.calls.append(Call("unwanted", self._now, state, reason))
        return reason

    def ended(self, now: float, kind: TransitionKind, outcome: Outcome) -> None:
        super().ended(now, kind, outcome)
        self.calls.append(Call("ended", now, None, (kind, outcome)))

    def refused(self, now: float, error: TransientError) -> Decision | None:
        decision = super().refused(now, error)
        self.calls.append(Call("refused", now, None, (str(error), decision)))
        return decision


def placement(step: Transition) -> list[list[tuple[int, int, int, int]]]:
    """Who holds which layers and how many slots after a step."""
    return [
        [(m.instance, m.layers.lo, m.layers.hi, m.capacity) for m in layout.members]
        for layout in step.after
    ]


def simulated(rows: Sequence[TraceRow], config: ClusterConfig, **machine: Any) -> list[Call]:
    """All calls in a simulation of these requests."""
    recorders: list[Recorder] = []

    def recorder(config: ClusterConfig) -> Recorder:
        recorders.append(Recorder(config))
        return recorders[0]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kunserve_sglang.simulation.control_loop.Controller", recorder)
        SimulatedCluster(profile(**machine), config).run(rows)
    return recorders[0].calls


class Replay:
    """What the simulator saw and when, and how its transitions ended, for a control plane."""

    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls
        self._next = 0
        self.now = 0.0
        self.seen: ClusterState | None = None

    def monotonic(self) -> float:
        return self.now

    def state(self) -> ClusterState:
        assert self.seen is not None
        return self.seen

    def to_the_next(self, *names: str) -> Call | None:
        """Make things as they were at the next call, which has to be one of these."""
        if self._next == len(self._calls):
            return None
        call = self._calls[self._next]
        assert call.name in names, call
        self._next += 1
        self.now = call.now
        self.seen = call.state or self.seen
        return call

    async def execute(
        self, make_plan: Callable[[], Plan], unwanted: Callable[[Plan], str]
    ) -> Event:
        """In place of the coordinator's: instances come to the same end as in the simulator."""
        if self._calls[self._next].name == "refused":
            self.to_the_next("refused")
        else:
            self.to_the_next("in_steps")
        plan = make_plan()
        while (call := self.to_the_next("unwanted", "ended")) and call.name == "unwanted":
            unwanted(plan)
        assert call is not None
        assert isinstance(call.said, tuple)
        kind, outcome = call.said
        return Event(
            epoch=plan.transition.epoch,
            kind=kind,
            reason=plan.reason,
            instances=plan.instances,
            status=outcome,
            time=0.0,
        )


def replayed(calls: list[Call], config: ClusterConfig, folder: Path) -> list[Call]:
    """The calls of a control plane in the same situations."""
    replay = Replay(calls)

    async def run() -> list[Call]:
        plane = ControlPlane(config, ControlSocket(f"ipc://{folder}/c"))
        recorder = plane.controller = Recorder(config)
        try:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(plane.registry, "now", replay.monotonic)
                patched.setattr(plane, "state", replay.state)
                patched.setattr(plane.coordinator, "execute", replay.execute)
                while replay.to_the_next("decide"):
                    await plane.look()
        finally:
            plane.close()
        return recorder.calls

    return asyncio.run(run())


def ends(calls: list[Call]) -> set[object]:
    return {call.said for call in calls if call.name == "ended"}


@settings(max_examples=15)
@given(
    loads,
    st.integers(2, 4),
    st.sampled_from(OverloadPolicy),
    st.sampled_from(ExchangeMode),
    st.sampled_from([None, 1.0, 30.0]),
)
def test_router_and_simulator_ask_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[TraceRow],
    instances: int,
    policy: OverloadPolicy,
    exchange: ExchangeMode,
    limit_ms: float | None,
) -> None:
    config = ClusterConfig(
        num_instances=instances,
        overload_policy=policy,
        exchange=exchange,
        tpot_limit_ms=limit_ms,
        dispatch=DispatchPolicy.ROUND_ROBIN,
    )
    calls = simulated(rows, config)
    assert replayed(calls, config, tmp_path_factory.mktemp("replay")) == calls


def test_they_restore_give_up_and_rebalance_alike(tmp_path: Path) -> None:
    config = ClusterConfig(
        num_instances=2,
        dispatch=DispatchPolicy.ROUND_ROBIN,
        overload_policy=OverloadPolicy.DROP_ALWAYS,
    )
    skewed = [TraceRow(0.02 * i, 4 if i % 2 else 120, 20 if i % 2 else 100) for i in range(60)]
    first = simulated(skewed, config, links=slow(1e3))
    begins = next(c.now for c in first if isinstance(c.said, RestoreRequest))
    again = [TraceRow(begins + 1 + r.arrival_s, 150, 60) for r in BURST]
    calls = simulated([*skewed, *again], config, links=slow(1e3))
    assert ends(calls) >= {
        (TransitionKind.DROP, Outcome.COMMITTED),
        (TransitionKind.REBALANCE, Outcome.COMMITTED),
        (TransitionKind.RESTORE, Outcome.COMMITTED),
        (TransitionKind.RESTORE, Outcome.ABORTED),
    }
    assert replayed(calls, config, tmp_path) == calls


def test_they_decline_alike(tmp_path: Path) -> None:
    config = ClusterConfig(num_instances=2, tpot_limit_ms=1.0)
    calls = simulated(BURST, config)
    refusals = [c.said for c in calls if c.name == "refused"]
    assert len(refusals) > 1
    assert [decision is not None for _, decision in refusals] == [
        True,
        *[False] * (len(refusals) - 1),
    ]
    assert replayed(calls, config, tmp_path) == calls

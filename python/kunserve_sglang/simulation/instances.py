"""All instances: who runs with whom, what they hold, and what happens next at one of them."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from kunserve_sglang.core.choices import MicroBatches
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.first_token import FirstTokenLimit
from kunserve_sglang.core.layout import LayerRange, Layout, Member
from kunserve_sglang.core.load import Load
from kunserve_sglang.policy.service_level import UNNAMED, Wanted
from kunserve_sglang.policy.state import ClusterState, InstanceState
from kunserve_sglang.simulation.cluster_profile import Profile
from kunserve_sglang.simulation.costs import Costs
from kunserve_sglang.simulation.group import Group
from kunserve_sglang.simulation.host import SimulatedHost
from kunserve_sglang.simulation.job import Job
from kunserve_sglang.simulation.owner import Owner
from kunserve_sglang.simulation.routing import Dispatch
from kunserve_sglang.simulation.solo import Solo

Runner = Solo | Group


class Instances:
    """Instances of one profile, each an owner in a runner: its own, or that of its group.

    `capacity` is that of an instance on its own, in token slots.
    """

    def __init__(self, profile: Profile, config: ClusterConfig) -> None:
        count = config.num_instances
        layers = LayerRange(0, profile.layers)
        self.memory = profile.memory(min(config.max_group_size, count))
        self.capacity = self.memory.capacity(layers, 1)
        self.owners = [Owner(i, self.capacity, profile) for i in range(count)]
        self._profile = profile
        self._split = config.micro_batches is MicroBatches.LOOKAHEAD
        self._costs = Costs(profile)
        self._host = SimulatedHost(profile.host)
        self._dispatch = Dispatch(config.dispatch, count)
        self._runners: list[Runner] = [self._solo(owner) for owner in self.owners]
        self._layouts = [Layout(epoch=0, members=(self._alone(i, layers),)) for i in range(count)]
        self._states: list[InstanceState | None] = [None] * count
        self._heap: list[tuple[float, int, Runner]] = []
        self._sequence = 0
        self._naming: list[Job] = []
        for owner in self.owners:
            self._dispatch.update(owner.number, 0, 0, owner.capacity)

    def _solo(self, owner: Owner) -> Solo:
        return Solo(owner, self._costs, self._host)

    def _alone(self, number: int, layers: LayerRange) -> Member:
        return Member(instance=number, layers=layers, capacity=self.capacity, address="")

    # -- events ----------------------------------------------------------------------------------

    @property
    def due(self) -> float:
        """When the next event is."""
        return self._heap[0][0] if self._heap else math.inf

    def fire(self) -> Runner | None:
        """Let the next event happen; returns at whom, unless it has been put off since."""
        due, _, runner = heapq.heappop(self._heap)
        if due != runner.due:
            return None
        runner.queued = math.inf
        owner = runner.fire(due)
        self._queue(runner)
        if owner is not None:
            self._report(owner, 0)
        return runner

    def arrive(self, job: Job, now: float) -> None:
        """A request goes to the instance that the router chooses."""
        self._host.arrived(now)
        if job.level.named:
            self._naming.append(job)
        number = self._dispatch.choose()
        runner = self._runners[number]
        owner = self.owners[number]
        owner.add(job)
        runner.arrived(number, now)
        self._queue(runner)
        self._report(owner, runner.steps_done(now))

    def _queue(self, runner: Runner) -> None:
        """Put the runner's next event into the heap; an earlier entry goes stale by itself."""
        if runner.due != runner.queued:
            runner.queued = runner.due
            if runner.due != math.inf:
                self._sequence += 1
                heapq.heappush(self._heap, (runner.due, self._sequence, runner))

    def _report(self, owner: Owner, steps_ahead: int) -> None:
        """A status record: the router knows how things stand."""
        self._dispatch.update(
            owner.number,
            owner.running + len(owner.waiting),
            owner.demand(steps_ahead),
            owner.capacity,
        )

    # -- how things stand ------------------------------------------------------------------------

    @property
    def finished(self) -> int:
        """Requests that have ended."""
        return sum(owner.finished for owner in self.owners)

    @property
    def cooperative(self) -> int:
        """Instances in groups."""
        return sum(isinstance(runner, Group) for runner in self._runners)

    def loads(self, now: float) -> list[Load]:
        """Of all instances; the router knows them as well."""
        loads: list[Load] = []
        for owner, runner in zip(self.owners, self._runners, strict=True):
            load = owner.load(runner.steps_done(now))
            loads.append(load)
            self._dispatch.update(
                owner.number, load.running + load.waiting, load.demand, owner.capacity
            )
        return loads

    def state(self, loads: Sequence[Load]) -> ClusterState:
        """For the policies."""
        states = []
        for number, load in enumerate(loads):
            state = self._states[number]
            layout = self._layouts[number]
            if state is None or state.load != load or state.layout is not layout:
                state = self._states[number] = InstanceState(
                    instance=number,
                    address="",
                    memory=self.memory,
                    layout=layout,
                    load=load,
                    costs=self._profile.cost,
                )
            states.append(state)
        return ClusterState(instances=tuple(states), wanted=self._wanted(loads))

    def _wanted(self, loads: Sequence[Load]) -> tuple[Wanted, ...]:
        """What requests under way want, as the router counts it."""
        if not self._naming:
            return ()
        self._naming = [job for job in self._naming if not job.done]
        counts = Counter(job.level for job in self._naming)
        counts[UNNAMED] = sum(load.running + load.waiting for load in loads) - len(self._naming)
        return tuple(Wanted(level=level, requests=n) for level, n in counts.items() if n > 0)

    def limit(self, most: Mapping[int, int], first_token: FirstTokenLimit) -> None:
        """How many requests may run at once, any number where nothing is said; and who is next."""
        for owner in self.owners:
            owner.bound(most.get(owner.number, 0))
            owner.first_token = first_token

    # -- transitions -----------------------------------------------------------------------------

    def stop(self, numbers: Iterable[int], now: float) -> None:
        """Ask those that run these instances to come to rest."""
        for runner in self._runners_of(numbers):
            runner.stop(now)
            self._queue(runner)

    def resting(self, numbers: Iterable[int]) -> bool:
        return all(runner.resting for runner in self._runners_of(numbers))

    def resume(self, numbers: Sequence[int], now: float) -> None:
        for runner in self._runners_of(numbers):
            runner.resume(now)
            self._queue(runner)
        for number in numbers:
            self._report(self.owners[number], self._runners[number].steps_done(now))

    def adopt(self, layouts: Iterable[Layout]) -> None:
        """Run by these layouts from now on; all of their members must be at rest if layers move."""
        for layout in layouts:
            for member in layout.members:
                owner = self.owners[member.instance]
                owner.capacity = member.capacity
                owner.full = False
            if layout.placement != self._layouts[layout.ids[0]].placement:
                self._regroup(layout)
                self._dispatch.regroup(tuple(layout.ids))
            for number in layout.ids:
                self._layouts[number] = layout

    def _regroup(self, layout: Layout) -> None:
        """The members run other layers than before, or with others."""
        owners = [self.owners[m.instance] for m in layout.members]
        for owner in owners:
            cooperated = isinstance(self._runners[owner.number], Group)
            if layout.cooperative and not cooperated:
                owner.decoding.to_group()
            elif cooperated and not layout.cooperative:
                owner.decoding.to_solo()
        runner: Runner
        if layout.cooperative:
            runner = Group(
                layout,
                owners,
                self._costs,
                self._host,
                self._profile.links,
                self._profile.activation_bytes_per_token,
                split=self._split,
            )
        else:
            runner = self._solo(owners[0])
        for owner in owners:
            self._runners[owner.number] = runner

    def _runners_of(self, numbers: Iterable[int]) -> list[Runner]:
        return list({id(self._runners[i]): self._runners[i] for i in numbers}.values())

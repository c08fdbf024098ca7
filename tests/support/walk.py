"""A walk of a member's state machine: what may happen to it next, and what it makes of that."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st

from kunserve_sglang.core.layout import LayerRange, Layout, Member
from kunserve_sglang.core.messages import (
    Abort,
    Commit,
    Lost,
    Mode,
    Transition,
    TransitionKind,
    TransitionStats,
)
from kunserve_sglang.instance.transitions.machine import (
    Machine,
    PendingAnswer,
    Reaction,
    only_grows,
)
from kunserve_sglang.instance.transitions.table import (
    OBJECTIONS,
    TABLE,
    Action,
    MemberEvent,
    MemberState,
)

ME, PEER, LAYERS = 0, 1, 4

MODES = {
    MemberState.INDEPENDENT: {Mode.INDEPENDENT},
    MemberState.COOPERATIVE: {Mode.COOPERATIVE},
    MemberState.FOLLOWING: {Mode.COOPERATIVE},
    MemberState.FETCHING: {Mode.RESTORING},
    MemberState.VOTED: {Mode.PREPARING, Mode.RESTORING},
    MemberState.EXCHANGING: {Mode.PREPARING, Mode.RESTORING},
    MemberState.RECOVERING: {Mode.RECOVERING},
}
MOVES_LAYOUT = {MemberEvent.EXCHANGED, MemberEvent.GROWTH_COMMITTED, MemberEvent.RECOVERED}
TAKES_BACK = {MemberEvent.ABORTED, MemberEvent.UNDECIDED, MemberEvent.TIMED_OUT}
NOTICED = [
    MemberEvent.OVERTAKEN,
    MemberEvent.UNDECIDED,
    MemberEvent.EXCHANGED,
    MemberEvent.TIMED_OUT,
    MemberEvent.ARRIVED,
    MemberEvent.PEER_LOST,
]


def alone(instance: int, epoch: int, capacity: int = 10) -> Layout:
    member = Member(instance=instance, layers=LayerRange(0, LAYERS), capacity=capacity, address="")
    return Layout(epoch=epoch, members=(member,))


def pair(epoch: int, capacity: int = 20) -> Layout:
    halves = (LayerRange(0, 2), LayerRange(2, LAYERS))
    members = tuple(
        Member(instance=i, layers=layers, capacity=capacity, address="")
        for i, layers in zip((ME, PEER), halves, strict=True)
    )
    return Layout(epoch=epoch, members=members)


def solos(epoch: int) -> tuple[Layout, ...]:
    return alone(ME, epoch), alone(PEER, epoch)


def candidates(now: Layout, epoch: int) -> list[Transition]:
    """What a router may plan from this layout."""
    drop, restore = TransitionKind.DROP, TransitionKind.RESTORE
    if not now.cooperative:
        before, after = (now, alone(PEER, now.epoch)), (pair(epoch),)
        larger = (alone(ME, epoch, now.member(ME).capacity + 1),)
        return [
            Transition(epoch=epoch, kind=drop, before=before, after=after),
            Transition(epoch=epoch, kind=drop, before=before, after=after, live=True),
            Transition(epoch=epoch, kind=drop, before=(now,), after=larger),
        ]
    larger = (pair(epoch, now.member(ME).capacity + 1),)
    return [
        Transition(epoch=epoch, kind=drop, before=(now,), after=larger),
        Transition(epoch=epoch, kind=restore, before=(now,), after=solos(epoch)),
        Transition(
            epoch=epoch, kind=restore, before=(now,), after=(pair(epoch, 5),), ahead=solos(epoch)
        ),
    ]


@dataclass
class Walk:
    """One member, and what is checked after each step of it."""

    machine: Machine = field(default_factory=lambda: Machine(alone(ME, 0), instance=ME))
    rest: tuple[MemberState, Layout, tuple[Layout, ...]] | None = None
    owed: list[PendingAnswer] = field(default_factory=list)

    def happen(
        self,
        event: MemberEvent,
        *,
        transition: Transition | None = None,
        answer: PendingAnswer | None = None,
        layout: Layout | None = None,
    ) -> Reaction:
        machine = self.machine
        was = (machine.state, machine.layout, machine.fetching)
        if event is MemberEvent.PREPARED:
            self.rest = was
        if answer is not None:
            self.owed.append(answer)
        reaction = machine.happen(event, transition=transition, answer=answer, layout=layout)
        now = (machine.state, machine.layout, machine.fetching)

        assert machine.mode in MODES[machine.state]
        assert event in MOVES_LAYOUT or machine.layout == was[1]
        if event in TAKES_BACK:
            assert now == self.rest
        if event in (MemberEvent.GROWTH_PREPARED, MemberEvent.GROWTH_ABORTED):
            assert now == was
        if event is MemberEvent.PEER_LOST or (
            event is MemberEvent.LOST and was[0] is not MemberState.VOTED
        ):
            assert machine.state is MemberState.RECOVERING
            assert (machine.pending, machine.growth, machine.under_way) == (None, None, None)
        self._settle(reaction)
        if Action.RELOAD in reaction.actions:
            self.happen(MemberEvent.RECOVERED, layout=alone(ME, machine.layout.epoch + 1))
            assert machine.mode is Mode.INDEPENDENT
        return reaction

    def _settle(self, reaction: Reaction) -> None:
        """What is owed is answered once, or something is left that will make it be answered."""
        gone = [answer for answer in self.owed if answer is not self.machine.pending]
        for answer in gone:
            assert answer is reaction.answer
            assert {Action.ANSWER, Action.REFUSE_PENDING} & set(reaction.actions)
            self.owed.remove(answer)
        if self.machine.pending is not None:
            assert self.machine.pending in self.owed
            moving = {MemberState.FOLLOWING, MemberState.FETCHING}
            at_rest = self.rest[0] if self.machine.under_way and self.rest else self.machine.state
            assert at_rest in moving

    def prepare(self, transition: Transition, *, willing: bool) -> None:
        """As the participant does it."""
        machine = self.machine
        if machine.state is MemberState.VOTED:
            if machine.under_way == transition:
                self.happen(MemberEvent.PREPARED_AGAIN)
            return
        if machine.fetching and machine.fetching != transition.after:
            self.happen(MemberEvent.FETCHED_IN_VAIN)
        if machine.state in OBJECTIONS or not willing:
            self.happen(MemberEvent.OBJECTED, transition=transition)
        elif only_grows(transition):
            self.happen(MemberEvent.GROWTH_PREPARED, transition=transition)
        else:
            self.happen(MemberEvent.PREPARED, transition=transition)


def plan(walk: Walk, data: st.DataObject, epoch: int, *, willing: bool) -> None:
    machine = walk.machine
    plans = candidates(machine.layout, epoch)
    if machine.fetching:
        before, after = (machine.layout,), machine.fetching
        switch = TransitionKind.RESTORE
        plans.append(Transition(epoch=epoch, kind=switch, before=before, after=after))
    walk.prepare(data.draw(st.sampled_from(plans)), willing=willing)


def proceed(walk: Walk, data: st.DataObject) -> None:
    """What comes next if nothing goes wrong."""
    machine = walk.machine
    if machine.state is MemberState.EXCHANGING:
        notice(walk, MemberEvent.EXCHANGED)
    elif aim := machine.under_way or machine.growth:
        walk.happen(machine.meaning_of(Commit(call=2, epoch=aim.epoch, deadline_s=1.0)))
    elif machine.pending is not None:
        notice(walk, MemberEvent.ARRIVED)
    else:
        plan(walk, data, machine.layout.epoch + 1, willing=True)


def step(walk: Walk, data: st.DataObject) -> None:
    """Anything at all: a command of any epoch, a plan, or something that the member notices."""
    machine = walk.machine
    what = data.draw(st.sampled_from(["proceed", "proceed", "plan", "command", "notice"]))
    reads = machine.state is not MemberState.EXCHANGING
    epoch = machine.layout.epoch + data.draw(st.integers(-1, 2))
    if what == "proceed":
        proceed(walk, data)
    elif what == "plan" and reads:
        willing = data.draw(st.booleans()) and epoch > machine.layout.epoch
        plan(walk, data, epoch, willing=willing)
    elif what == "command" and reads:
        aims = [epoch, machine.layout.epoch]
        if aim := machine.under_way or machine.growth:
            aims.append(aim.epoch)
        epoch = data.draw(st.sampled_from(aims))
        commands: list[Commit | Abort | Lost] = [
            Commit(call=2, epoch=epoch, deadline_s=1.0),
            Abort(call=3, epoch=epoch, reason="no"),
            Lost(broken=epoch, epoch=epoch + 1, instances=(PEER,)),
        ]
        walk.happen(machine.meaning_of(data.draw(st.sampled_from(commands))))
    else:
        possible = [
            event
            for event in NOTICED
            if event in TABLE[machine.state]
            and (event is not MemberEvent.ARRIVED or machine.pending is not None)
        ]
        if possible:
            notice(walk, data.draw(st.sampled_from(possible)))


def notice(walk: Walk, event: MemberEvent) -> None:
    answer = None
    if walk.machine.state is MemberState.EXCHANGING:
        commit = Commit(call=4, epoch=walk.machine.layout.epoch, deadline_s=1.0)
        answer = PendingAnswer(commit.epoch, commit, TransitionStats())
    walk.happen(event, answer=answer)

"""The state machine of a member, in random orders of all that can happen to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.core.messages import (
    Commit,
    Lost,
    Transition,
)
from kunserve_sglang.instance.transitions.machine import (
    Machine,
)
from kunserve_sglang.instance.transitions.table import (
    TABLE,
    Action,
    MemberEvent,
    MemberState,
)
from tests.support.walk import (
    ME,
    PEER,
    Walk,
    alone,
    candidates,
    notice,
    step,
)

DOCUMENT = Path(__file__).parents[3] / "docs" / "member.md"


def carry_out(walk: Walk, transition: Transition) -> None:
    """All but the arrival of what moves while serving."""
    walk.prepare(transition, willing=True)
    walk.happen(walk.machine.meaning_of(Commit(call=5, epoch=transition.epoch, deadline_s=1.0)))
    notice(walk, MemberEvent.EXCHANGED)


def begun(start: MemberState) -> Walk:
    """A member that has come to this state by what a router plans."""
    walk = Walk()
    if start is not MemberState.INDEPENDENT:
        stop, live, _ = candidates(walk.machine.layout, 1)
        carry_out(walk, live if start is MemberState.FOLLOWING else stop)
    if start is MemberState.FETCHING:
        carry_out(walk, candidates(walk.machine.layout, 2)[-1])
    if start is MemberState.RECOVERING:
        notice(walk, MemberEvent.PEER_LOST)
    assert walk.machine.state is start
    return walk


STARTS = [
    s
    for s in MemberState
    if s not in (MemberState.VOTED, MemberState.EXCHANGING, MemberState.AT_REST)
]


@pytest.mark.parametrize("start", STARTS)
@given(data=st.data())
def test_any_order_of_events_leads_from_state_to_state(
    start: MemberState, data: st.DataObject
) -> None:
    walk = begun(start)
    for _ in range(data.draw(st.integers(1, 20))):
        step(walk, data)


@pytest.mark.parametrize("start", STARTS)
@given(data=st.data())
def test_whatever_came_before_a_loss_ends_independent(
    start: MemberState, data: st.DataObject
) -> None:
    walk = begun(start)
    for _ in range(data.draw(st.integers(0, 20))):
        step(walk, data)
    machine = walk.machine
    if machine.state is MemberState.EXCHANGING:
        notice(walk, MemberEvent.TIMED_OUT)
    elif machine.state is MemberState.VOTED:
        notice(walk, MemberEvent.UNDECIDED)
    broken = machine.layout.epoch
    walk.happen(machine.meaning_of(Lost(broken=broken, epoch=broken + 1, instances=(PEER,))))
    assert machine.state is MemberState.INDEPENDENT
    assert not walk.owed


@pytest.mark.parametrize(
    ("state", "event"),
    [(s, e) for s, steps in TABLE.items() for e in MemberEvent if e not in steps],
)
def test_what_cannot_happen_is_an_error_and_changes_nothing(
    state: MemberState, event: MemberEvent
) -> None:
    machine = Machine(alone(ME, 3), instance=ME)
    machine.state = state
    with pytest.raises(InternalError, match=event):
        machine.happen(event)
    assert (machine.state, machine.layout) == (state, alone(ME, 3))


def test_the_table_speaks_of_all_states_events_and_actions() -> None:
    steps = [step for steps in TABLE.values() for step in steps.values()]
    assert set(TABLE) == set(MemberState) - {MemberState.AT_REST}
    assert {event for steps in TABLE.values() for event in steps} == set(MemberEvent)
    assert {action for step in steps for action in step.actions} == set(Action)


def picture() -> str:
    """The table as a diagram of what changes the state, and as a list of everything."""
    edges: dict[tuple[MemberState, MemberState], list[MemberEvent]] = {}
    for state, steps in TABLE.items():
        for event, (target, _) in steps.items():
            if target is not state:
                edges.setdefault((state, target), []).append(event)
    edges = {
        e: events for e, events in edges.items() if e[1] is not MemberState.AT_REST or passes(e[0])
    }
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> independent"]
    for (state, target), events in edges.items():
        lines.append(f"    {state} --> {target}: {', '.join(events)}")
    lines += ["```", "", "| state | event | next state | actions |", "|---|---|---|---|"]
    for state, steps in TABLE.items():
        for event, (target, actions) in steps.items():
            lines.append(f"| {state} | {event} | {target} | {', '.join(actions)} |")
    return "\n".join(lines)


def passes(state: MemberState) -> bool:
    """Whether coming to rest can lead to another state than this one."""
    return state not in (MemberState.INDEPENDENT, MemberState.COOPERATIVE)


def test_the_document_shows_the_table() -> None:
    assert picture() in DOCUMENT.read_text(), f"{DOCUMENT.name} should contain:\n{picture()}"

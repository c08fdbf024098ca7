"""Faults on purpose: how they are written, and when they happen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kunserve_sglang.core import faults
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.fault_points import INSTANCE_POINTS, POINTS, ROUTER_POINTS, FaultKind
from kunserve_sglang.core.faults import FAULT_ENVIRONMENT, Faults, InjectedFault, faults_in
from tests.support.repository import PACKAGE, sources


class Effects:
    """Notes what would have happened to the process."""

    def __init__(self) -> None:
        self.suffered: list[object] = []

    def crash(self) -> None:
        self.suffered.append("crash")

    def hang(self) -> None:
        self.suffered.append("hang")

    def delay(self, seconds: float) -> None:
        self.suffered.append(seconds)


def read(text: str) -> tuple[InjectedFault, ...]:
    return faults_in({FAULT_ENVIRONMENT: text})


def test_several_can_be_written_down() -> None:
    assert faults_in({}) == ()
    assert read("") == ()
    assert read("transition.joined:crash:1, exchange.sent:corrupt:7:0") == (
        InjectedFault("transition.joined", FaultKind.CRASH),
        InjectedFault("exchange.sent", FaultKind.CORRUPT, 7, instance=0),
    )
    (late,) = read("control.vote:delay=0.5:2")
    assert (late.kind, late.nth, late.delay_s) == (FaultKind.DELAY, 2, 0.5)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("transition.joined:crash", "this is not point:kind:nth"),
        ("transition.joined:crash:1:0:0", "this is not point:kind:nth"),
        ("transition.gone:crash:1", "there is no point 'transition.gone'"),
        ("transition.joined:drop:1", "what can happen there is crash, hang, delay"),
        ("pipeline.sent:corrupt:1", "what can happen there is crash, hang, delay, drop"),
        ("control.vote:explode:1", "what can happen there is crash, hang, delay, drop"),
        ("control.vote:drop:0", "nth is a number from 1 on"),
        ("control.vote:drop:-1", "nth is a number from 1 on"),
        ("control.vote:drop:once", "nth is a number from 1 on"),
        ("control.vote:drop=2:1", "drop takes no seconds"),
        ("control.vote:delay=0:1", "a delay takes some seconds"),
        ("control.vote:delay=nan:1", "a delay takes some seconds"),
        ("control.vote:delay=soon:1", "a delay takes some seconds"),
        ("control.vote:drop:1:0", "an instance is a number, and the router has none"),
        ("member.vote:drop:1:x", "an instance is a number, and the router has none"),
        ("member.vote:drop:1,member.vote", "this is not point:kind:nth"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, why: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        read(text)
    assert why in str(refused.value)
    assert FAULT_ENVIRONMENT in str(refused.value)
    assert "\n" not in str(refused.value)


def test_each_happens_once_at_its_time() -> None:
    effects = Effects()
    two = Faults(read("transition.joined:crash:2,member.vote:drop:1"), effects)
    reached = [two.reach(p) for p in ("member.vote", "member.vote", "member.commit")]
    assert reached == [FaultKind.DROP, None, None]
    assert not two.happened
    for _ in range(4):
        assert two.reach("transition.joined") is None
    assert effects.suffered == ["crash"]
    assert two.happened


def test_a_process_suffers_by_itself_what_no_caller_can_do() -> None:
    effects = Effects()
    text = "barrier.sent:crash:1,barrier.sent:hang:2,barrier.sent:delay=3:3,barrier.sent:corrupt:4"
    suffering = Faults(read(text), effects)
    assert [suffering.reach("barrier.sent") for _ in range(5)] == [
        *(None, None, None),
        FaultKind.CORRUPT,
        None,
    ]
    assert effects.suffered == ["crash", "hang", 3.0]


def test_nothing_happens_unless_it_is_armed() -> None:
    assert not faults.armed()
    assert faults.at("transition.joined") is None


@pytest.mark.parametrize(
    ("instance", "concerned"),
    [(None, {"control.vote"}), (0, {"member.vote"}), (1, {"member.vote", "member.commit"})],
)
def test_a_process_takes_what_concerns_it(
    instance: int | None,
    concerned: set[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(
        FAULT_ENVIRONMENT, "control.vote:drop:1,member.vote:drop:1,member.commit:drop:1:1"
    )
    try:
        faults.arm_from_environment(instance)
        taken = {p for p in POINTS if faults.at(p) is FaultKind.DROP}
    finally:
        faults.arm(None)
    assert taken == concerned
    assert all(point in caplog.text for point in taken)


def test_a_process_that_none_concerns_is_not_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULT_ENVIRONMENT, "control.vote:drop:1")
    faults.arm_from_environment(0)
    assert not faults.armed()


def in_file(file: Path, text: str) -> None:
    """As whoever writes it should: nobody ever sees half of it."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def test_a_file_may_change_while_the_process_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "faults"
    in_file(file, "")
    monkeypatch.setenv(FAULT_ENVIRONMENT, f"@{file}")
    reach = "member.vote"
    try:
        faults.arm_from_environment(1)
        assert faults.armed()
        assert [faults.at(reach) for _ in range(2)] == [None, None]
        in_file(file, f"{reach}:drop:2:1, {reach}:drop:1:0")
        assert [faults.at(reach) for _ in range(3)] == [None, FaultKind.DROP, None]
        in_file(file, f"{reach}:drop:1:1")
        assert [faults.at(reach) for _ in range(2)] == [FaultKind.DROP, None]
        in_file(file, f"{reach}:drop")
        assert faults.at(reach) is None
        assert "this is not point:kind:nth" in caplog.text
        in_file(file, f"{reach}:drop:1")
        file.unlink()
        assert faults.at(reach) is None
    finally:
        faults.arm(None)


def test_a_file_is_read_at_the_start_and_refused_if_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "faults"
    with pytest.raises(ConfigurationError, match="it cannot be read"):
        read(f"@{file}")
    monkeypatch.setenv(FAULT_ENVIRONMENT, f"@{file}")
    with pytest.raises(ConfigurationError, match="it cannot be read"):
        faults.arm_from_environment()
    assert not faults.armed()
    in_file(file, "control.vote:drop:1")
    assert read(f"@{file}") == (InjectedFault("control.vote", FaultKind.DROP),)
    try:
        faults.arm_from_environment()
        assert faults.at("control.vote") is FaultKind.DROP
    finally:
        faults.arm(None)


def test_what_the_code_calls_a_point_is_one() -> None:
    named = {
        name
        for path in sources(PACKAGE)
        for name in re.findall(r"faults\.at\(\"([^\"]+)\"\)", path.read_text())
    }
    assert named
    assert named <= POINTS.keys()


def test_names_say_whose_points_they_are() -> None:
    assert not ROUTER_POINTS.keys() & INSTANCE_POINTS.keys()
    assert {name.split(".")[0] for name in ROUTER_POINTS} == {"control", "proxy"}

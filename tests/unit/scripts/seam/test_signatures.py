"""Whether our calls and overrides survive another signature."""

from __future__ import annotations

import pytest

from seam.compare import Change
from seam.table import Use
from tests.unit.scripts.seam.versions import Rig, entry, replaced


@pytest.mark.parametrize(
    ("ours", "new", "change"),
    [
        ("make(1)", "first, second=None, third=None", Change.PARAMETERS),
        ("make(1)", "first, second=None, *, third", Change.SIGNATURE),
        ("make(1, 2)", "first", Change.SIGNATURE),
        ("make(1)", "first", Change.PARAMETERS),
        ("make(1, second=2)", "first, other=None", Change.SIGNATURE),
        ("make(1, second=2)", "first, other=None, second=None", Change.PARAMETERS),
        ("make(*ours)", "first", Change.SIGNATURE),
        ("make(1)", "first, second=3", Change.VALUE),
    ],
)
def test_whether_our_calls_survive_a_signature(
    rig: Rig, ours: str, new: str, change: Change
) -> None:
    rig.use(ours)
    rig.write("new", "thing", replaced(("first, second=None", new)))

    finding = rig.finding(entry("make", Use.CALLS))

    assert (finding.change, finding.was, finding.now) == (
        change,
        "(first, second=None)",
        f"({new})",
    )
    assert finding.breaks is (change is Change.SIGNATURE)


def test_an_override_survives_no_other_parameters(rig: Rig) -> None:
    rig.write("new", "thing", replaced(("self, batch,", "self, batch, more=None,")))

    assert rig.finding(entry("run", Use.CALLS, owner="Thing")).change is Change.PARAMETERS
    assert rig.finding(entry("run", Use.OVERRIDES, owner="Thing")).change is Change.SIGNATURE


def test_a_class_of_ours_is_constructed_by_the_signature_of_its_base(rig: Rig) -> None:
    rig.use("class Ours(Thing): ...\nOurs(1, color='blue', our_own=2)")
    rig.write("new", "thing", replaced((', color="red"', "")))

    assert rig.finding(entry("Thing", Use.EXTENDS)).change is Change.SIGNATURE


def test_a_class_makes_its_constructor_from_its_fields(rig: Rig) -> None:
    rig.use("Record(1)")
    text = "from dataclasses import dataclass\n@dataclass\nclass Record:\n    first: int\n"
    rig.write("old", "thing", text)
    rig.write("new", "thing", text + "    second: int\n")

    finding = rig.finding(entry("Record", Use.CALLS))

    assert (finding.change, finding.was, finding.now) == (
        Change.SIGNATURE,
        "(first)",
        "(first, second)",
    )

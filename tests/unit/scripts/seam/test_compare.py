"""What is found out of a name between two versions of a small package that stands for SGLang."""

from __future__ import annotations

from pathlib import Path

import pytest

from seam.compare import Change, compare, facts_of
from seam.errors import SeamError
from seam.source import Source
from seam.table import Entry, Use
from tests.unit.scripts.seam.versions import MODULE, OLD, Rig, entry, replaced

ALL = (
    entry("helper", Use.IMPORTS),
    entry("LIMIT", Use.READS),
    entry("Thing", Use.EXTENDS),
    entry("make", Use.CALLS),
    *(
        entry(name, Use.READS, owner="Thing")
        for name in ("count", "half", "run", "state", "size", "inherited", "__init__")
    ),
)


def test_the_same_is_the_same_whatever_its_comments_types_and_layout(rig: Rig) -> None:
    rig.write("new", "helpers", "def helper(): ...\n")
    rig.write(
        "new",
        "thing",
        replaced(
            ('"""Says what it does."""', '"""Says more."""'),
            ("  # and so on", ""),
            ("fast: bool = False) -> int", "fast: int = False,\n    )"),
        ),
    )

    assert rig.findings(*ALL) == []


@pytest.mark.parametrize("lost", ALL, ids=lambda lost: lost.name)
def test_a_name_that_is_gone(rig: Rig, lost: Entry) -> None:
    rig.write("new", "thing", "")

    finding = rig.finding(lost)

    assert (finding.change, finding.breaks) == (Change.GONE, True)


def test_an_attribute_that_no_method_assigns_any_more(rig: Rig) -> None:
    rig.write("new", "thing", replaced(("self.state, other", "state, other")))

    assert rig.finding(entry("state", Use.READS, owner="Thing")).change is Change.GONE


@pytest.mark.parametrize(
    ("name", "owner", "place"),
    [
        ("make", "", "sglang.srt.elsewhere:make"),
        ("Thing", "", "sglang.srt.elsewhere:Thing"),
        ("state", "Thing", "sglang.srt.elsewhere:Thing.state"),
        ("run", "Thing", "sglang.srt.elsewhere:Thing.run"),
    ],
)
def test_a_name_that_has_moved(rig: Rig, name: str, owner: str, place: str) -> None:
    rig.write("new", "thing", "")
    rig.write("new", "elsewhere", OLD)

    finding = rig.finding(entry(name, Use.CALLS, owner=owner))

    assert (finding.change, finding.now, finding.breaks) == (Change.MOVED, place, True)


def test_a_member_that_another_class_of_its_module_has_now(rig: Rig) -> None:
    rig.write(
        "new",
        "thing",
        replaced(("self.state, other", "state, other")) + "\n    class Part:\n        state = 1\n",
    )

    assert rig.finding(entry("state", Use.READS, owner="Thing")).now == f"{MODULE}:Part.state"


def test_a_name_that_can_still_be_imported_has_not_moved_but_for_hooks(rig: Rig) -> None:
    rig.write("new", "elsewhere", OLD)
    rig.write("new", "thing", "from .elsewhere import *\n")

    assert rig.findings(entry("make", Use.CALLS)) == []
    assert rig.finding(entry("make", Use.HOOKS)).change is Change.MOVED


def test_a_function_that_does_something_else(rig: Rig) -> None:
    rig.write("new", "thing", replaced(("return len(batch)", "return 0")))

    finding = rig.finding(entry("run", Use.OVERRIDES, owner="Thing"))

    assert (finding.change, finding.breaks) == (Change.BODY, False)


def test_another_default(rig: Rig) -> None:
    rig.write("new", "thing", replaced(("count: int = 1", "count: int = 2")))

    finding = rig.finding(entry("count", Use.READS, owner="Thing"))

    assert (finding.change, finding.was, finding.now) == (Change.VALUE, "1", "2")


def test_what_was_called_and_is_a_value_now(rig: Rig) -> None:
    rig.write(
        "new", "thing", replaced(("def half(self):", "def half(self, of):"), ("@property", ""))
    )

    assert rig.finding(entry("half", Use.READS, owner="Thing")).change is Change.SIGNATURE


def test_an_attribute_may_become_a_property_unless_we_write_it(rig: Rig) -> None:
    changed = replaced(
        ("self.size = size", "pass"),
        ("def inherited", "@property\n        def size(self): ...\n        def inherited"),
    )
    rig.write("new", "thing", changed)

    assert rig.finding(entry("size", Use.READS, owner="Thing")).change is Change.BODY
    assert rig.finding(entry("size", Use.WRITES, owner="Thing")).change is Change.SIGNATURE


def test_what_is_only_mirrored_breaks_nothing_at_once(rig: Rig) -> None:
    rig.write("new", "thing", "")

    assert not rig.finding(entry("make", Use.MIRRORS)).breaks


def test_the_worst_comes_first(rig: Rig) -> None:
    rig.use("make(1, 2)")
    rig.write(
        "new",
        "thing",
        replaced(
            ("first, second=None", "first"), ("return len(batch)", "return 0"), ("LIMIT", "MOST")
        ),
    )

    found = rig.findings(
        entry("run", Use.CALLS, owner="Thing"), entry("make", Use.CALLS), entry("LIMIT", Use.READS)
    )

    assert [f.change for f in found] == [Change.GONE, Change.SIGNATURE, Change.BODY]


def test_settings_are_found_wherever_they_are_declared(rig: Rig) -> None:
    for version in ("old", "new"):
        rig.write(version, "environ", "class Envs:\n    SGLANG_ON = EnvBool(True)\n")
    rig.write("old", "server_args", "class ServerArgs:\n    page_size: int = 1\n")
    rig.write("new", "server_args", "class ServerArgs: ...\n")
    rig.write("new", "arg_groups/fields", "class Memory:\n    page_size: int = 1\n")
    settings = [
        Entry("environment", "SGLANG_ON", frozenset({Use.SETS}), "", "things"),
        Entry("flags", "--page-size", frozenset({Use.SETS}), "", "things"),
        entry("page_size", Use.READS, owner="ServerArgs", module="sglang.srt.server_args"),
    ]

    assert rig.findings(*settings) == []
    rig.write("new", "environ", "class Envs: ...\n")
    rig.write("new", "arg_groups/fields", "class Memory: ...\n")
    assert [f.change for f in rig.findings(*settings)] == [Change.GONE] * 3


def test_what_is_not_there_cannot_be_written_down() -> None:
    with pytest.raises(SeamError, match=f"not in this SGLang:\n  {MODULE}:missing"):
        facts_of([entry("missing", Use.CALLS)], Source(Path("/nowhere")))


def test_what_was_not_written_down_cannot_be_compared(rig: Rig) -> None:
    with pytest.raises(SeamError, match="--update"):
        compare([entry("make", Use.CALLS)], {}, Source(Path("/nowhere")), rig.usage)

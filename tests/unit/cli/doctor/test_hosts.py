"""What the doctor reads in the kernel's files."""

from __future__ import annotations

import pytest

from kunserve_sglang.cli.doctor.hosts import shown_gpus, this_host


@pytest.mark.parametrize(
    ("visible", "shown"),
    [
        (None, ("A", "B")),
        ("", ()),
        ("-1", ()),
        ("1", ("B",)),
        ("1, 0", ("B", "A")),
        ("0,7,1", ("A",)),
        ("GPU-1234", ("GPU",)),
    ],
)
def test_gpus_are_those_that_programs_see(visible: str | None, shown: tuple[str, ...]) -> None:
    assert shown_gpus(("A", "B"), visible) == shown


def test_this_host_has_what_every_host_has() -> None:
    host = this_host()
    assert host.cores > 0
    assert host.memory.available > 0
    assert host.mappings > 0
    assert host.temporary.error == ""

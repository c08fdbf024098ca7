"""What a probe sees."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kunserve_sglang.api.types import ClusterStatus, InstanceStatus
from kunserve_sglang.core.messages import Mode
from kunserve_sglang.launch.ready_file import ReadyFile


def cluster(*instances: dict[str, Any]) -> ClusterStatus:
    usual: dict[str, Any] = {"url": "", "mode": Mode.INDEPENDENT, "serving": True, "in_flight": 0}
    found = [InstanceStatus(id=n, **(usual | values)) for n, values in enumerate(instances)]
    return cast(ClusterStatus, SimpleNamespace(instances=found))


@pytest.mark.parametrize(
    ("second", "there"),
    [
        ({}, True),
        ({"stalled": False}, True),
        ({"serving": False}, False),
        ({"draining": True}, False),
        ({"stalled": True}, False),
    ],
)
def test_it_is_there_as_long_as_all_take_requests(
    tmp_path: Path, second: dict[str, Any], there: bool
) -> None:
    path = tmp_path / "ready"
    ready = ReadyFile(str(path))
    for before in (True, False):
        ready.show(before)
        ready.follow(cluster({}, second), {0, 1})
        assert path.exists() is there
        ready.follow(None, {0, 1})
        assert path.exists() is there, "a router that is away says nothing of instances"
    ready.follow(cluster({}), {0, 1})
    assert not path.exists(), "nobody knows the second one"


def test_what_an_earlier_launcher_left_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    path.touch()
    assert ReadyFile(str(path)).wanted
    assert not path.exists()


def test_without_a_path_there_is_no_file() -> None:
    ready = ReadyFile("")
    ready.show(True)
    assert not ready.wanted

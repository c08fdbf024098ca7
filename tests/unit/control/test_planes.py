"""Each plane runs without the other's modules."""

from __future__ import annotations

import subprocess
import sys

import pytest

_LIST_MODULES = """
import importlib, pkgutil, sys
for room in sys.argv[1:]:
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(package.__path__, room + "."):
        importlib.import_module(module.name)
print("\\n".join(sys.modules))
"""

_PLANNER = (
    "kunserve_sglang.control.control_plane",
    "kunserve_sglang.control.coordinator",
    "kunserve_sglang.control.hub",
    "kunserve_sglang.policy.monitor",
    "kunserve_sglang.policy.planner",
    "zmq",
)


@pytest.mark.parametrize(
    ("rooms", "strangers"),
    [
        (["control"], ("kunserve_sglang.router", "starlette")),
        (["router.proxy", "router.http"], (*_PLANNER, "kunserve_sglang.router.admin")),
        (["api"], ("kunserve_sglang.control", "kunserve_sglang.router", "starlette", *_PLANNER)),
    ],
    ids=["control", "proxy", "api"],
)
def test_a_plane_loads_nothing_of_the_other(rooms: list[str], strangers: tuple[str, ...]) -> None:
    names = [f"kunserve_sglang.{room}" for room in rooms]
    done = subprocess.run(
        [sys.executable, "-c", _LIST_MODULES, *names],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    loaded = done.stdout.split()
    assert set(names) <= set(loaded)
    assert not [m for m in loaded if any(m == s or m.startswith(s + ".") for s in strangers)]

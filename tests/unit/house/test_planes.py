"""The control plane runs where there is no proxy, and the proxy loads where there is no planner."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from tests.support.places import ROOT

_LOAD = """
import importlib, pkgutil, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if any(name == m or name.startswith(m + ".") for m in MISSING):
            raise ImportError(f"{name} is missing")

sys.meta_path.insert(0, Missing())
for room in ROOMS:
    for module in pkgutil.walk_packages(importlib.import_module(room).__path__, room + "."):
        importlib.import_module(module.name)
"""

_RUN_CONTROL_PLANE = """
import asyncio
from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.control_socket import ControlSocket
from kunserve_sglang.core.cluster_config import ClusterConfig

async def main():
    control = ControlPlane(ClusterConfig(num_instances=0), ControlSocket("ipc://ADDRESS"))
    running = asyncio.create_task(control.run())
    done, _ = await asyncio.wait([running], timeout=0.5)
    assert not done, done
    assert not control.state().instances
    running.cancel()
    control.close()

asyncio.run(main())
"""


def _fails(rooms: Sequence[str], missing: Sequence[str], then: str = "") -> str:
    """Of a process that loads all modules of `rooms` while others are `missing`: its last words."""
    code = _LOAD.replace("ROOMS", repr(rooms)).replace("MISSING", repr(missing)) + then
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    return ended.stderr[-500:] if ended.returncode else ""


def test_the_control_plane_runs_without_the_proxy(tmp_path: Path) -> None:
    run = _RUN_CONTROL_PLANE.replace("ADDRESS", f"{tmp_path}/control")
    assert not _fails(["kunserve_sglang.control"], ["kunserve_sglang.router"], run)


def test_the_proxy_loads_without_the_planner() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = {c["id"]: c for c in settings["tool"]["importlinter"]["contracts"]}
    proxy = contracts["proxy"]
    assert not _fails(proxy["source_modules"], proxy["forbidden_modules"])
    assert "is missing" in _fails(["kunserve_sglang.router.admin"], proxy["forbidden_modules"])

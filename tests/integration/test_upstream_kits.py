"""The most telling tests of SGLang's own kits, on instances in a group."""

from __future__ import annotations

from pathlib import Path

import pytest

from kunserve_sglang.testing.upstream_case import Runner, Server
from kunserve_sglang.testing.upstream_kits import KITS, Kit
from tests.integration.conftest import Client

LIMIT_S = 120.0

QUICK = [(kit, test) for kit in KITS for test in kit.quick]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """One for all tests: SGLang is imported once."""
    return Runner(tmp_path_factory.mktemp("kits") / "log")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("phase", ["during"], indirect=True)
@pytest.mark.parametrize(("kit", "test"), QUICK, ids=lambda part: getattr(part, "name", part))
def test_a_cluster_passes_what_one_server_does(
    cluster: Client, phase: str, runner: Runner, model: Path, kit: Kit, test: str
) -> None:
    outcome = runner.run(Server(cluster.url, model), kit, test, LIMIT_S)
    assert outcome.result == "passed", f"{phase}: {outcome.why}"
    assert cluster.modes() == {"cooperative"}

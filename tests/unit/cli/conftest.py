"""What tests of the command line need."""

from __future__ import annotations

import pytest

from kunserve_sglang.cli import main
from tests.support.command_line import Done, Run
from tests.support.router_harness import RouterCluster


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process, against a port if one is given."""
    for name in ("URL", "ADMIN_API_KEY", "READ_API_KEY"):
        monkeypatch.delenv(f"KUNSERVE_{name}", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(router: RouterCluster | None, *words: str) -> Done:
        where = [f"--url=127.0.0.1:{router.port}"] if router else []
        try:
            status = main([*where, *words])
        except SystemExit as end:
            status = int(end.code or 0)
        return Done(status, *capsys.readouterr())

    return run

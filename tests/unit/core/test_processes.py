"""What is arranged before libraries are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kunserve_sglang.core.processes import compile_nothing, schedulers_on, this_host
from tests.support.network import can_make_networks
from tests.support.waiting import until


def test_nothing_is_compiled_unless_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    compile_nothing()
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    compile_nothing()
    assert os.environ["TORCHDYNAMO_DISABLE"] == "0"


@pytest.mark.skipif(not can_make_networks(), reason="needs to make namespaces, as root")
def test_who_sees_other_files_is_on_another_host() -> None:
    code = "from kunserve_sglang.core.processes import this_host; print(this_host())"
    same = [sys.executable, "-c", code]
    apart = ["unshare", "--mount", *same]
    found = [subprocess.check_output(c, text=True, timeout=60).strip() for c in (same, apart)]
    assert found[0] == this_host()
    assert found[1] != this_host()
    assert found[1].startswith(Path("/proc/sys/kernel/random/boot_id").read_text().strip())


def test_schedulers_that_may_use_the_same_cores_are_seen() -> None:
    one, *others = sorted(os.sched_getaffinity(0))
    with subprocess.Popen(
        ["sglang::scheduler_TP0", "60"],
        executable="/bin/sleep",
        preexec_fn=lambda: os.sched_setaffinity(0, [one]),
    ) as scheduler:
        try:
            until(lambda: scheduler.pid in schedulers_on([one, *others]))
            assert scheduler.pid in schedulers_on([one])
            assert scheduler.pid not in schedulers_on(others)
            assert schedulers_on([]) == []
        finally:
            scheduler.kill()

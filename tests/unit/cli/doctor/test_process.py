"""The doctor as a program of an installation, on hosts where something is really wrong."""

from __future__ import annotations

import fcntl
import json
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kunserve_sglang.launch.standing import LOCK
from tests.support.installed import Installed
from tests.support.places import ROOT

SMALL = ("--num-instances=1", "--memory-budget=64MiB")
"""What any machine that runs the tests can serve."""


@pytest.fixture(scope="module")
def router_only(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Without SGLang and torch."""
    return Installed(tmp_path_factory.mktemp("router"), without=("sglang", "torch"))


def diagnosis(installed: Installed, *words: str, **environment: str) -> dict[str, Any]:
    done = installed.run("kunserve", "doctor", "--json", *words, **environment)
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (not found["serves"]), done.stderr
    assert len(done.stderr.splitlines()) == done.returncode
    return found


def errors(installed: Installed, *words: str, **environment: str) -> list[str]:
    found = diagnosis(installed, *(words or SMALL), **environment)["findings"]
    return [f["name"] for f in found if f["level"] == "error"]


def warnings(installed: Installed, *words: str, **environment: str) -> dict[str, str]:
    found = diagnosis(installed, *(words or SMALL), **environment)["findings"]
    return {f["name"]: f["what"] for f in found if f["level"] == "warning"}


def test_this_machine_is_well(installed: Installed, tiny_model: Path, tmp_path: Path) -> None:
    where = (f"--model-path={tiny_model}", f"--state-folder={tmp_path / 'new' / 'state'}")
    found = diagnosis(installed, *SMALL, *where)
    assert found["serves"], found["findings"]
    assert found["facts"]["model"]["parameter_bytes"] > 0
    assert found["facts"]["model"]["dtype"] == "float32"
    own = found["facts"]["installation"]["own"]
    assert own["imported"] == own["brought"] == str(installed.site / "kunserve_sglang")
    assert list(tmp_path.iterdir()) == []


def test_it_says_for_people_what_it_says_for_programs(installed: Installed) -> None:
    done = installed.run("kunserve", "doctor", *SMALL, "--host=0.0.0.0")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any(line.startswith("sglang  ") and "our fork" in line for line in lines)
    at = lines.index("error: --host 0.0.0.0 is open to others, and there is no key")
    assert lines[at + 1].startswith("  -> set KUNSERVE_ADMIN_API_KEY")
    assert done.stderr == "kunserve: 1 error would keep this host from serving\n"


def test_it_imports_nothing_heavy(installed: Installed) -> None:
    program = (
        "import sys; from kunserve_sglang.cli import main; main(['doctor']); "
        "sys.exit(str({'torch', 'sglang', 'numpy', 'zmq', 'transformers'} & sys.modules.keys()))"
    )
    assert installed.run("-c", program).stderr.splitlines()[-1] == "set()"


def test_a_host_of_a_router_is_told_so(router_only: Installed) -> None:
    assert "router" in warnings(router_only, "--host=127.0.0.1")["no-sglang"]
    assert errors(router_only, "--host=127.0.0.1") == []
    assert errors(router_only, "--num-instances=0") == []
    assert errors(router_only, "--num-instances=2") == ["no-sglang"]
    assert errors(router_only, "--model-path=org/model") == ["no-sglang"]


def test_few_open_files(installed: Installed) -> None:
    program = f"ulimit -n 64; exec {installed.bin}/kunserve doctor --json {' '.join(SMALL)}"
    launcher = f"import os; os.execv('/bin/sh', ['sh', '-c', {program!r}])"
    found = json.loads(installed.run("-c", launcher).stdout)
    assert [f["name"] for f in found["findings"] if f["level"] == "error"] == ["open-files"]


def test_a_state_folder_that_cannot_be_used(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("/proc/kunserve", tmp_path / "file", tmp_path / "file" / "state"):
        assert errors(installed, *SMALL, f"--state-folder={folder}") == ["state-folder"]
    used = tmp_path / "used"
    used.mkdir()
    with (used / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert errors(installed, *SMALL, f"--state-folder={used}") == ["state-folder"]
    assert errors(installed, *SMALL, f"--state-folder={used}") == []
    assert [path.name for path in used.iterdir()] == [LOCK]


def test_a_checkout_on_the_path_before_what_is_installed(installed: Installed) -> None:
    path = str(ROOT / "python")
    assert path in warnings(installed, PYTHONPATH=path)["shadowed"]
    assert warnings(installed).keys() <= {"open-files"}


@pytest.fixture
def unpacked(installed: Installed, tmp_path: Path) -> Iterator[Path]:
    """Our wheel, unpacked before what is installed on the path."""
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(installed.wheel) as archive:
        archive.extractall(folder)
    return folder


def test_a_plugin_that_sglang_does_not_find(installed: Installed, unpacked: Path) -> None:
    (entries,) = unpacked.glob("*.dist-info/entry_points.txt")
    entries.write_text("[sglang.srt.plugins]\nkunserve = kunserve_sglang.moved:register\n")
    assert errors(installed, PYTHONPATH=str(unpacked)) == ["plugin"]
    entries.unlink()
    assert errors(installed, PYTHONPATH=str(unpacked)) == ["plugin"]
    assert errors(installed, SGLANG_PLUGINS="other") == ["plugin-off"]


def test_a_package_that_is_needed_and_not_there(installed: Installed, unpacked: Path) -> None:
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    metadata.write_text(text.replace("Requires-Dist: uvloop", "Requires-Dist: no-such-loop>=1"))
    found = diagnosis(installed, *SMALL, PYTHONPATH=str(unpacked))["findings"]
    assert [f["what"] for f in found] == ["no-such-loop: needed, not installed"]


def test_a_port_that_is_taken(installed: Installed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert errors(installed, *SMALL, f"--port={port}") == ["port"]


def test_a_model_that_cannot_be_read(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()  # nobody can read that, root included
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "nothing"):
        assert errors(installed, *SMALL, f"--model-path={path}") == ["model"]
    assert "model" in warnings(installed, *SMALL, "--model-path=org/model")


def test_a_budget_that_cannot_be_had(installed: Installed, tiny_model: Path) -> None:
    assert errors(installed, "--num-instances=1", "--memory-budget=900TiB")[0] == "memory"
    small = ("--num-instances=1", "--memory-budget=64KiB", f"--model-path={tiny_model}")
    assert errors(installed, *small) == ["budget"]


def test_flags_that_no_launcher_takes_are_wrong_usage(installed: Installed) -> None:
    for words in ("--port=70000", "--memory-budget=much", "--api-key-file=/proc/none", "--url=x"):
        done = installed.run("kunserve", "doctor", words)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert len(done.stderr.splitlines()) == 1

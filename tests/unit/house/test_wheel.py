"""What a user installs is whole, and needs no checkout."""

from __future__ import annotations

import ast
import json
import tomllib
import urllib.request
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement

from fork import load_spec
from kunserve_sglang.testing.cluster import Cluster
from tests.support.installed import Installed
from tests.support.places import ROOT
from tests.support.repository import PACKAGE

LEFT_OUT = ("testing", "sglang_seam/contract")
"""Folders that only those who work on the repository have a use for."""

PROGRAMS = ("launch_server", "launch_instance", "simulate", "cli")


def _names(wheel: Path) -> set[str]:
    """Files of our package in it, by their place in the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = {PurePosixPath(n) for n in archive.namelist() if ".dist-info/" not in n}
    return {str(name.relative_to(PACKAGE.name)) for name in names}


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_has_all_files_of_the_package(installed: Installed) -> None:
    files = (p.relative_to(PACKAGE) for p in PACKAGE.rglob("*") if p.is_file())
    ours = {p.as_posix() for p in files if "__pycache__" not in p.parts}
    wanted = {name for name in ours if not name.startswith(tuple(f"{f}/" for f in LEFT_OUT))}
    known = {"router/admin/web/index.html", "simulation/profiles/qwen2.5-14b-a800.toml", "py.typed"}
    assert known < wanted < ours
    assert _names(installed.wheel) == wanted


def test_nothing_in_it_looks_around_where_it_lies(installed: Installed) -> None:
    """Its own data it finds by `importlib.resources`; what is beside it is somebody else's."""
    with zipfile.ZipFile(installed.wheel) as archive:
        modules = [name for name in archive.namelist() if name.endswith(".py")]
        nosy = [
            name
            for name in modules
            for node in ast.walk(ast.parse(archive.read(name)))
            if isinstance(node, ast.Name) and node.id == "__file__"
        ]
    assert len(modules) > 200
    assert nosy == []


def test_nothing_in_it_imports_what_was_left_out(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        text = {n: archive.read(n).decode() for n in archive.namelist() if n.endswith(".py")}
    assert [name for name, code in text.items() if "kunserve_sglang.testing" in code] == []


def test_its_extras_take_the_pinned_sglang_for_cpus_and_for_gpus(installed: Installed) -> None:
    spec = load_spec(ROOT / "patches")
    fork = spec.variant("kunserve").version
    wanted = {"serve": (fork, spec.upstream_version), "gpu": (spec.upstream_version, fork)}
    lines = _metadata(installed.wheel).get_all("Requires-Dist") or []
    needed = [r for line in lines if (r := Requirement(line)).name == "sglang"]
    assert len(needed) == len(wanted)
    for requirement in needed:
        (extra,) = (
            e for e in wanted if requirement.marker and requirement.marker.evaluate({"extra": e})
        )
        right, wrong = wanted[extra]
        assert requirement.specifier.contains(right)
        assert not requirement.specifier.contains(wrong)


def test_its_python_is_the_one_that_sglang_is_pinned_for(installed: Installed) -> None:
    asked = Requirement(f"x{_metadata(installed.wheel)['Requires-Python']}").specifier
    tags = load_spec(ROOT / "patches").sha256
    assert all(asked.contains(f"{tag[2]}.{tag[3:]}.9") for tag in tags)
    assert not asked.contains(f"3.{max(int(tag[3:]) for tag in tags) + 1}.0")


def test_programs_start_without_a_checkout(installed: Installed) -> None:
    done = installed.run("-c", f"import {PACKAGE.name}; print({PACKAGE.name}.__file__)")
    assert Path(done.stdout.strip()).parent == installed.site / PACKAGE.name
    helps = [installed.run("kunserve", "--help")]
    helps += [installed.run("-m", f"{PACKAGE.name}.{name}", "--help") for name in PROGRAMS]
    for done in helps:
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: ")


def test_a_simulator_knows_the_profiles_that_come_with_it(
    installed: Installed, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.csv"
    rows = (f"2026-01-01 00:00:0{i}.0000000,100,20" for i in range(9))
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    words = ("--profile", "smollm2-135m-cpu", "--trace", str(trace), "--compare", "none")
    done = installed.run("-m", f"{PACKAGE.name}.simulate", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "9 requests" in done.stdout


def test_a_simulator_without_numpy_says_so_in_one_line(installed: Installed) -> None:
    code = "import runpy, sys; sys.modules['numpy'] = None; runpy.run_module(PROGRAM)"
    done = installed.run("-c", code.replace("PROGRAM", f"'{PACKAGE.name}.simulate'"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == "kunserve: this needs numpy: pip install 'kunserve-sglang[simulate]'"


def test_a_router_alone_has_all_that_it_serves(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(installed.elsewhere)
    launcher = (str(installed.python), "-m", f"{PACKAGE.name}.launch_server")
    pages = ["docs", "dashboard", "kunserve/openapi.json"]
    web = PACKAGE / "router" / "admin" / "web"
    pages += [f"dashboard/{p.name}" for p in web.iterdir() if p.name != "index.html"]
    with Cluster(
        lambda port: [*launcher, "--num-instances", "0", "--port", str(port)],
        tmp_path / "log",
        environment=installed.environment,
    ) as cluster:
        with urllib.request.urlopen(f"{cluster.url}/kunserve/status", timeout=20) as answer:
            assert json.load(answer)["instances"] == []
        for page in pages:
            with urllib.request.urlopen(f"{cluster.url}/{page}", timeout=20) as answer:
                assert answer.status == 200, page
        done = installed.run("kunserve", "--url", cluster.url, "status")
        assert (done.returncode, done.stderr) == (0, "")


def test_its_script_and_its_plugin_are_declared(installed: Installed) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(installed.wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        declared = archive.read(name).decode()
    for entry in (project["scripts"], *project["entry-points"].values()):
        for key, value in entry.items():
            assert f"{key} = {value}" in declared

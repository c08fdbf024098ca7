"""The dashboard's files: that they come with the package, and how they are served."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from tests.support.places import ROOT
from tests.support.router_harness import RouterCluster

WEB = Path(str(files("kunserve_sglang.router.admin") / "web"))
NAMES = sorted(f.name for f in WEB.iterdir())


def path_of(name: str) -> str:
    return "/dashboard" if name == "index.html" else f"/dashboard/{name}"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_served_for_this_page_alone(idle_router: RouterCluster, name: str) -> None:
    answer = idle_router.get(path_of(name))
    assert answer.status == 200
    assert answer.body == (WEB / name).read_bytes()
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    again = idle_router.get(path_of(name), **{"If-None-Match": answer.headers["etag"]})
    assert (again.status, again.body) == (304, b"")


def test_media_types(idle_router: RouterCluster) -> None:
    found = {n: idle_router.get(path_of(n)).headers["content-type"] for n in NAMES}
    assert found["index.html"] == "text/html; charset=utf-8"
    assert found["main.js"] == "text/javascript; charset=utf-8"
    assert found["style.css"] == "text/css; charset=utf-8"
    assert found["icon.svg"] == "image/svg+xml"


def test_a_slash_at_the_end_is_forgiven(idle_router: RouterCluster) -> None:
    answer = idle_router.get("/dashboard/")
    assert answer.status == 307
    assert answer.headers["location"] == "../dashboard"


@pytest.mark.parametrize("path", ["/dashboard/nothing.js", "/dashboard/../app.py"])
def test_nothing_else_is_served(idle_router: RouterCluster, path: str) -> None:
    assert idle_router.get(path).error["code"] == "not_found"


def test_the_page_is_read_only_by_default(idle_router: RouterCluster) -> None:
    assert idle_router.post("/dashboard").status == 405


def test_all_that_files_name_is_there() -> None:
    named = set(re.findall(r'(?:href|src)="dashboard/([^"]+)"', (WEB / "index.html").read_text()))
    for module in WEB.glob("*.js"):
        named |= set(re.findall(r'from "\./([^"]+)"', module.read_text()))
    assert named == set(NAMES) - {"index.html"}


def test_nothing_is_loaded_from_elsewhere() -> None:
    for name in NAMES:
        text = (WEB / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE), name


def test_a_wheel_has_the_files(tmp_path: Path) -> None:
    """An editable installation would not notice that they are left out."""
    base = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path)]
    subprocess.run([sys.executable, "setup.py", "-q", *base], cwd=ROOT, check=True, timeout=120)
    built = tmp_path / "kunserve_sglang" / "router" / "admin" / "web"
    assert sorted(f.name for f in built.iterdir()) == NAMES

"""The shape of the code: files of a size to read, a name for one thing, walls between the rooms."""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.support.places import ROOT
from tests.support.repository import PACKAGE, rooms, sources, tree

MAX_LINES = 300

TESTS = ROOT / "tests"


def test_no_file_is_longer_than_can_be_read_at_once() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources(PACKAGE)}
    assert {name for name, lines in lengths.items() if lines > MAX_LINES} == set()


def test_a_class_name_occurs_once() -> None:
    found: defaultdict[str, set[Path]] = defaultdict(set)
    for path in sources(PACKAGE):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                found[node.name].add(path)
    assert {name for name, paths in found.items() if len(paths) > 1} == set()


def test_nothing_but_benchmarks_needs_benchmarks() -> None:
    folders = (PACKAGE, ROOT / "scripts", *(f for f in TESTS.iterdir() if f.name != "benchmark"))
    assert _importers("benchmark", *(f for f in folders if f.is_dir())) == set()


def test_nothing_but_tests_needs_tests() -> None:
    assert _importers("tests", PACKAGE, ROOT / "scripts", ROOT / "benchmark") == set()


def test_the_contract_of_the_seam_has_every_room() -> None:
    """A list of `pyproject.toml`: rooms that are new have to be added, programs as well."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = {c["id"]: c for c in settings["tool"]["importlinter"]["contracts"]}
    programs = {p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__"}
    everybody = (rooms() | programs) - {"sglang_seam", "testing"}
    assert set(contracts["seam"]["source_modules"]) == {f"{PACKAGE.name}.{r}" for r in everybody}


def _importers(top: str, *folders: Path) -> set[str]:
    """Files that import the top-level package `top`."""
    return {
        str(path.relative_to(ROOT))
        for path in sources(*folders)
        if any(name.split(".")[0] == top for name in _imports(path))
    }


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module

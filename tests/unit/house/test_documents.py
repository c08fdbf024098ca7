"""What documents, docstrings and comments name is there. Where links lead: `test_site.py`."""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from documents import pages, without_blocks
from tests.support.places import ROOT
from tests.support.repository import (
    PACKAGE,
    classes,
    files,
    functions,
    globals_of,
    rooms,
    sources,
)

DOCUMENTS = pages(ROOT)
INVARIANTS = ROOT / "docs" / "invariants.md"

_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_FILE = re.compile(r"[\w.-]+\.(?:py|md|toml|js|css|html)")
_PATH = re.compile(r"(?:[\w.*-]+/)+[\w.*-]*")
_CLASS = re.compile(r"(?:[a-z_]+\.)*([A-Z]\w*[a-z]\w*)(?:\.(\w+))?(?:\(\))?")
_MODULE = re.compile(r"([a-z_]+)(?:\.\w+)+")
_TEST = re.compile(r"test_\w+")

FOREIGN_PATHS = re.compile(r"(?:build|dist|out)/|(?:text|application|image)/")
"""Paths that are not ours: what programs write, and media types."""

DATA = (".csv", ".json", ".png")
"""Ends of file names that would look like modules."""

OURS = {"structures", "invariants", "memory", "ranks", "decisions", "transitions", "testing"}
"""Documents about our own code: every class that they name is one of ours."""


def missing(name: str, beside: Path, *, ours: bool) -> bool:
    """Whether `name`, as it stands in backticks, is something that should be here and is not."""
    if _TEST.fullmatch(name):
        return name not in functions() and f"{name}.py" not in files()
    if _FILE.fullmatch(name):
        return name not in files()
    if _PATH.fullmatch(name):
        return not FOREIGN_PATHS.match(name) and not _exists(name, beside)
    module = _MODULE.fullmatch(name)
    if module and module[1] in rooms() and not name.endswith(DATA):
        return not _is_in_package(name)
    if ours and (known := _CLASS.fullmatch(name)):
        members = classes().get(known[1], {}).values()
        return not any(known[2] is None or known[2] in m for m in members)
    return False


def _exists(name: str, beside: Path) -> bool:
    for folder in (beside, ROOT, PACKAGE):
        if any(folder.glob(name.rstrip("/"))) or (folder / f"{name}.py").exists():
            return True
    return False


def _is_in_package(name: str) -> bool:
    """A module, or what a module defines; `policy.dispatch.least_load`, `instance.agent.Agent`."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        folder = PACKAGE.joinpath(*parts[:count])
        module = folder.with_suffix(".py")
        if module.exists() or folder.is_dir():
            inside = [module] if module.exists() else sorted(folder.glob("*.py"))
            rest = parts[count:]
            if not rest:
                return True
            if any(rest[0] in globals_of(path) for path in inside):
                return len(rest) == 1 or any(
                    rest[1] in m for m in classes().get(rest[0], {}).values()
                )
            return False
    return False


def _comments(path: Path) -> Iterator[str]:
    """Comments and strings that stand for themselves, such as docstrings."""
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT or (
                token.type == tokenize.STRING and token.string.startswith('"""')
            ):
                yield token.string


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_what_a_document_names_exists(document: Path) -> None:
    text = without_blocks(document.read_text())
    ours = document.stem in OURS
    names = _CODE.findall(text)
    assert [n for n in names if missing(n, document.parent, ours=ours)] == []


def test_what_comments_name_exists() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources()
        for comment in _comments(path)
        for name in _CODE.findall(comment)
        if missing(name, path.parent, ours=False)
    ]
    assert wrong == []


def test_numbers_of_invariants_are_those_of_the_document() -> None:
    known = set(re.findall(r"^## (\d+)\.", INVARIANTS.read_text(), re.MULTILINE))
    named = {n for p in sources() for n in re.findall(r"\binvariant (\d+)", p.read_text())}
    assert named
    assert named <= known


def test_structures_has_a_line_for_every_room() -> None:
    lines = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/structures.md").read_text(), re.MULTILINE)
    assert sorted(lines) == sorted(rooms())


@pytest.mark.parametrize(
    "name",
    [
        "policy/prophet.py",
        "prophet.py",
        "policy/prophet",
        "policy.prophet",
        "policy.planner.prophesy",
        "Prophet",
        "Agent.prophesy",
        "tests/unit/policy/test_prophet.py",
        "test_the_future_is_known",
    ],
)
def test_a_name_of_nothing_is_noticed(name: str) -> None:
    assert missing(name, ROOT / "docs", ours=True)

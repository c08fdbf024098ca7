"""What the repository has: its files, and the names that its Python files define."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.places import ROOT

PACKAGE = ROOT / "python" / "kunserve_sglang"
PYTHON = (PACKAGE, ROOT / "tests", ROOT / "benchmark", ROOT / "scripts")


def sources(*folders: Path) -> Iterator[Path]:
    """Python files, in a fixed order."""
    for folder in folders or PYTHON:
        yield from sorted(folder.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def files() -> frozenset[str]:
    """Names of all files of the project, without their folders."""
    folders = (*PYTHON, ROOT / "docs", ROOT / "patches", ROOT / "examples", ROOT / "requirements")
    inside = {p.name for folder in folders for p in folder.rglob("*") if p.is_file()}
    return frozenset(inside | {p.name for p in ROOT.iterdir() if p.is_file()})


@cache
def rooms() -> frozenset[str]:
    return frozenset(p.parent.name for p in PACKAGE.glob("*/__init__.py"))


@cache
def classes() -> dict[str, dict[Path, frozenset[str]]]:
    """Class -> the files that define it -> names of what it has: methods, fields, attributes."""
    found: defaultdict[str, dict[Path, frozenset[str]]] = defaultdict(dict)
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                found[node.name][path] = frozenset(_members(node))
    return dict(found)


@cache
def functions() -> frozenset[str]:
    """Names of all functions and methods."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(
        node.name for path in sources() for node in ast.walk(tree(path)) if isinstance(node, kinds)
    )


@cache
def globals_of(path: Path) -> frozenset[str]:
    """Names that a module binds at its top level, imports included."""
    names: set[str] = set()
    for node in tree(path).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Import() | ast.ImportFrom():
                names.update(a.asname or a.name for a in node.names)
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(t.id for t in targets if isinstance(t, ast.Name))
    return frozenset(names)


def _members(node: ast.ClassDef) -> Iterator[str]:
    for inner in ast.walk(node):
        match inner:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield inner.name
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name

"""Names that the seam's code uses of objects which are not ours, found by mypy and by syntax.

SGLang's objects are `Any` to mypy and all others have types, so what is read of an `Any` is
SGLang's: mypy knows which expressions those are, through variables, loops and calls.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mypy import build, modulefinder, nodes, options, types
from mypy.traverser import NameAndMemberCollector

from tests.support.places import ROOT

PACKAGE = ROOT / "python" / "kunserve_sglang"
SEAM = PACKAGE / "sglang_seam"
_PREFIX = "kunserve_sglang.sglang_seam"

_UNREAD = (
    "sglang",
    "torch",
    "numpy",
    "cuda",
    "transformers",
    "triton",
    "huggingface_hub",
    "psutil",
)
"""Packages whose types would take minutes to read and say nothing here."""


def sources() -> dict[str, ast.Module]:
    """The seam's files by name."""
    return {file.name: ast.parse(file.read_text()) for file in sorted(SEAM.glob("*.py"))}


def imported() -> Iterator[tuple[str, str, str]]:
    """Of each `from sglang... import name as here`: the module, the name, and the name here."""
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang"):
                for alias in node.names:
                    yield node.module or "", alias.name, alias.asname or alias.name


@cache
def attributes() -> dict[str, list[str]]:
    """Names read or written of what is not ours, each with its places as `file:line`."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    result = _checked()
    from_sglang = {here for _, _, here in imported()}
    for module in sorted(name for name in result.files if name.startswith(f"{_PREFIX}.")):
        collector = NameAndMemberCollector()
        result.files[module].accept(collector)
        for expression in collector.member_exprs:
            if _is_foreign(expression, result.types.get(expression.expr), from_sglang):
                place = f"{module.rpartition('.')[2]}.py:{expression.line}"
                found[expression.name].append(place)
    return dict(found)


def named_in_strings() -> dict[str, list[str]]:
    """The same for names given to `getattr` and its like as strings.

    Where the name is a variable, all strings in the file's tuples and keys of dictionaries may be
    it.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)
    for file, tree in sources().items():
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _takes_a_name(n)]
        strings: list[ast.expr | None] = [call.args[1] for call in calls]
        if any(not isinstance(call.args[1], ast.Constant) for call in calls):
            for node in ast.walk(tree):
                if isinstance(node, ast.Tuple):
                    strings += node.elts
                elif isinstance(node, ast.Dict):
                    strings += node.keys
        for string in strings:
            match string:
                case ast.Constant(value=str(text)) if re.fullmatch(r"[a-z_]\w*", text):
                    found[text].append(f"{file}:{string.lineno}")
                case _:
                    pass
    return dict(found)


def constants(folder: Path, pattern: str) -> set[str]:
    """What matches `pattern` in any string in the product's code below `folder`."""
    return {
        match.group()
        for file in folder.rglob("*.py")
        if "testing" not in file.parts
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for match in re.finditer(pattern, node.value)
    }


def own_names() -> set[str]:
    """Names that the seam's own classes define."""
    found: set[str] = set()
    for tree in sources().values():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name):
                    found.add(name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    found.add(name)
                case ast.AnnAssign(target=ast.Name(id=name)):
                    found.add(name)
                case _:
                    pass
    return found


def _takes_a_name(node: ast.Call) -> bool:
    called = ast.unparse(node.func)
    return len(node.args) > 1 and called in {
        *("getattr", "setattr", "hasattr", "delattr", "object.__setattr__"),
    }


def _checked() -> build.BuildResult:
    settings = options.Options()
    settings.python_version = (3, 11)
    settings.mypy_path = [str(PACKAGE.parent)]
    settings.explicit_package_bases = settings.namespace_packages = True
    settings.ignore_missing_imports = True
    settings.check_untyped_defs = True
    settings.follow_imports = "silent"
    settings.export_types = settings.preserve_asts = True
    settings.incremental = False
    unread = {"follow_imports": "skip", "ignore_missing_imports": True}
    settings.per_module_options = {
        pattern: unread for name in _UNREAD for pattern in (name, f"{name}.*")
    }
    return build.build(
        [
            modulefinder.BuildSource(str(file), f"{_PREFIX}.{file.stem}", None)
            for file in sorted(SEAM.glob("*.py"))
            if file.stem != "__init__"
        ],
        settings,
    )


def _is_foreign(
    expression: nodes.MemberExpr, kind: types.Type | None, from_sglang: set[str]
) -> bool:
    if kind is None:
        # A module, or code that mypy takes for unreachable: what is in a module is imported.
        node = getattr(expression.expr, "node", None)
        return isinstance(expression.expr, nodes.RefExpr) and isinstance(node, nodes.Var)
    kind = types.get_proper_type(kind)
    if isinstance(kind, types.Instance):
        # Of a class of ours that inherits from one of SGLang's, what we have not given it.
        return kind.type.fallback_to_any and kind.type.get(expression.name) is None
    if not isinstance(kind, types.AnyType):
        return False
    while kind.source_any is not None:
        kind = kind.source_any
    unread = kind.missing_import_name
    return unread is None or unread.rpartition(".")[2] in from_sglang

"""One source file of SGLang: what its syntax defines and imports."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from seam.facts import Function

Definition = ast.ClassDef | Function | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Import:
    """`name` of `module` under another name; no `name`: the module itself."""

    module: str
    name: str


@dataclass
class Module:
    """A parsed module by its dotted `name`; `package` is what relative imports start from."""

    name: str
    package: str
    tree: ast.Module
    definitions: dict[str, Definition] = field(default_factory=dict)
    imports: dict[str, Import] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for node in _statements(self.tree.body):
            self._note(node)

    @classmethod
    def read(cls, file: Path, name: str) -> Module:
        """Parse `file`."""
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        return cls(name, package, ast.parse(file.read_bytes()))

    @cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        """Those at the top of the module."""
        return {k: d for k, d in self.definitions.items() if isinstance(d, ast.ClassDef)}

    def _note(self, node: ast.stmt) -> None:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            self.definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for name in assigned_names(node):
                # `Thing = rebuilt(Thing)` says less of it than what it was made from.
                self.definitions.setdefault(name, node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                self.imports[alias.asname or whole] = Import(whole, "")
        elif isinstance(node, ast.ImportFrom):
            module = self._absolute(node)
            self.stars += [module for alias in node.names if alias.name == "*"]
            for alias in node.names:
                self.imports[alias.asname or alias.name] = Import(module, alias.name)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.package.split(".")
        base = parts[: len(parts) - node.level + 1]
        return ".".join([*base, node.module] if node.module else base)


def members(node: ast.ClassDef) -> dict[str, Definition]:
    """What a class's body defines; of several, the last."""
    found: dict[str, Definition] = {}
    for part in _statements(node.body):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            # `@name.setter` adds to the property of that name and does not replace it.
            decorators = {ast.unparse(d) for d in part.decorator_list}
            if f"{part.name}.setter" not in decorators:
                found[part.name] = part
        elif isinstance(part, ast.Assign | ast.AnnAssign):
            found |= dict.fromkeys(assigned_names(part), part)
    return found


def instance_attributes(node: ast.ClassDef) -> set[str]:
    """Names that the class's methods assign on their first parameter."""
    found: set[str] = set()
    for method in members(node).values():
        if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = [*method.args.posonlyargs, *method.args.args]
        if arguments:
            found |= set(_assigned_on(method, arguments[0].arg))
    return found


def makes_fields(node: ast.ClassDef, lineage: Iterable[tuple[Module, ast.ClassDef]]) -> bool:
    """Whether what a class's body annotates are parameters of its construction."""
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return True
    bases = {ast.unparse(base) for _, part in lineage for base in part.bases}
    return bool(bases & {"msgspec.Struct", "Struct", "NamedTuple"})


def by_name_only(node: ast.ClassDef) -> bool:
    """Whether a class with fields takes them by name only."""
    calls = [d for d in node.decorator_list if isinstance(d, ast.Call)]
    keywords = [*node.keywords, *(keyword for call in calls for keyword in call.keywords)]
    return any(k.arg == "kw_only" and ast.unparse(k.value) == "True" for k in keywords)


def assigned_names(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """Plain names among the targets."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)]


def _assigned_on(method: Function, first: str) -> Iterator[str]:
    for node in ast.walk(method):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute, ctx=ast.Store()):
                if name == first:
                    yield attribute
            case _:
                pass


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a body and of the conditions and attempts in it."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, part, ()))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _statements(handler.body)

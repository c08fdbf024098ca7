"""SGLang's source as a whole: finds a name through imports and base classes, and describes it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from seam import facts
from seam.facts import Fact, Kind
from seam.module import (
    Definition,
    Import,
    Module,
    by_name_only,
    instance_attributes,
    makes_fields,
    members,
)
from seam.table import ENVIRONMENT, FLAGS, Entry

SERVER_ARGS = "sglang.srt.server_args:ServerArgs"

_ENVIRONMENT_MODULE = "sglang.srt.environ"
_ARGUMENT_GROUPS = "sglang.srt.arg_groups"
"""Some versions declare server arguments here and put the class together at run time."""

_LONGEST_CHAIN = 8
"""Imports of imports; more is a circle."""


class Source:
    """The package below `root`; files are read when they are asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, Module | None] = {}

    def fact(self, entry: Entry) -> Fact | None:
        """What this version says of an entry's name; None if it has none."""
        if entry.scope == ENVIRONMENT:
            return self._environment(entry.name)
        if entry.scope == FLAGS:
            return self._server_argument(entry.name.lstrip("-").replace("-", "_"), entry.name)
        if not entry.owner:
            return self.top(entry.module, entry.name)
        found = self.member(entry.module, entry.owner, entry.name)
        if found is None and entry.scope == SERVER_ARGS:
            return self._server_argument(entry.name)
        return found

    # -- names of modules and classes ------------------------------------------------------------

    def module(self, name: str) -> Module | None:
        """The module, if there is one of that name."""
        if name not in self._modules:
            path = self.root / name.replace(".", "/")
            files = [f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()]
            self._modules[name] = Module.read(files[0], name) if files else None
        return self._modules[name]

    def top(self, module: str, name: str) -> Fact | None:
        """A module's own or imported name."""
        found = self.resolve(module, name)
        if found is None:
            submodule = self.module(f"{module}.{name}")
            return Fact(Kind.MODULE, module) if submodule else None
        where, node = found
        return self._describe(node, where.name, where, in_class=False)

    def member(self, module: str, owner: str, name: str) -> Fact | None:
        """A class's own or inherited name."""
        classes = list(self.lineage(module, owner))
        for where, node in classes:
            if (found := members(node).get(name)) is not None:
                return self._describe(found, f"{where.name}:{node.name}", where, in_class=True)
        for where, node in classes:
            if name in instance_attributes(node):
                return Fact(Kind.ATTRIBUTE, f"{where.name}:{node.name}")
        return None

    def resolve(self, module: str, name: str, depth: int = 0) -> tuple[Module, Definition] | None:
        """Where a name of `module` is defined, through imports."""
        where = self.module(module)
        if where is None or depth > _LONGEST_CHAIN:
            return None
        if name in where.definitions:
            return where, where.definitions[name]
        imported = [where.imports[name]] if name in where.imports else []
        for step in (*imported, *(Import(star, name) for star in where.stars)):
            if step.name and (found := self.resolve(step.module, step.name, depth + 1)):
                return found
        return None

    def lineage(self, module: str, name: str) -> Iterator[tuple[Module, ast.ClassDef]]:
        """A class and its base classes as far as they are SGLang's, nearest first."""
        found = self.resolve(module, name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return
        where, node = found[0], found[1]
        yield where, node
        for base in node.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(plain, ast.Name) and plain.id != name:
                yield from self.lineage(where.name, plain.id)
            elif isinstance(plain, ast.Attribute) and isinstance(plain.value, ast.Name):
                alias = where.imports.get(plain.value.id)
                if alias is not None:
                    holder = f"{alias.module}.{alias.name}" if alias.name else alias.module
                    yield from self.lineage(holder, plain.attr)

    def _describe(self, node: Definition, place: str, where: Module, *, in_class: bool) -> Fact:
        if isinstance(node, ast.ClassDef):
            return Fact(Kind.CLASS, place, self._construction(where, node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return facts.of_function(node, place)
        kind = Kind.FIELD if in_class else Kind.CONSTANT
        return Fact(kind, place, facts.value(node.value))

    def _construction(self, where: Module, node: ast.ClassDef) -> str:
        """Parameters of `__init__`, or the fields of a class that makes its own."""
        lineage = list(self.lineage(where.name, node.name))
        for _, part in lineage:
            init = members(part).get("__init__")
            if isinstance(init, ast.FunctionDef):
                return facts.parameters(init.args)
        fields: dict[str, str] = {}
        for _, part in reversed(lineage):
            for name, member in members(part).items() if makes_fields(part, lineage) else ():
                if isinstance(member, ast.AnnAssign):
                    default = facts.value(member.value)
                    fields[name] = f"{name}={default}" if default else name
        stars = ["*"] if fields and by_name_only(node) else []
        return f"({', '.join([*stars, *fields.values()])})"

    # -- settings --------------------------------------------------------------------------------

    def _environment(self, name: str) -> Fact | None:
        module = self.module(_ENVIRONMENT_MODULE)
        for node in module.classes.values() if module else ():
            found = members(node).get(name)
            if isinstance(found, ast.Assign | ast.AnnAssign):
                return Fact(Kind.SETTING, _ENVIRONMENT_MODULE, facts.value(found.value))
        files = self.files_with(rf"[\"']{re.escape(name)}[\"']", name)
        return Fact(Kind.SETTING, "read from os.environ") if files else None

    def _server_argument(self, field: str, flag: str = "") -> Fact | None:
        """A field of the server's arguments, or a flag that is no field's."""
        module, _, owner = SERVER_ARGS.partition(":")
        found = self.member(module, owner, field)
        for name in () if found else self.files_with(rf"^    {field}\s*:", field, _ARGUMENT_GROUPS):
            holder = self.module(name)
            for node in holder.classes.values() if holder else ():
                member = members(node).get(field)
                if isinstance(member, ast.AnnAssign):
                    found = Fact(Kind.FIELD, f"{name}:{node.name}", facts.value(member.value))
        if found is not None:
            return Fact(Kind.SETTING if flag else found.kind, SERVER_ARGS, found.signature)
        if flag and self.files_with(f'"{flag}"', flag, module):
            return Fact(Kind.SETTING, SERVER_ARGS)
        return None

    # -- looking everywhere ----------------------------------------------------------------------

    def files_with(self, pattern: str, word: str, under: str = "sglang.srt") -> list[str]:
        """Names of the modules whose text matches `pattern`, which has `word` in it, in order."""
        wanted, rough = re.compile(pattern.encode(), re.MULTILINE), word.encode()
        return [
            name
            for name, text in self._texts.items()
            if name.startswith(under) and rough in text and wanted.search(text)
        ]

    @cached_property
    def _texts(self) -> dict[str, bytes]:
        files = sorted((self.root / "sglang" / "srt").rglob("*.py"))
        return {self._name_of(file): file.read_bytes() for file in files}

    def _name_of(self, file: Path) -> str:
        parts = file.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

"""What can be said of a definition from its syntax alone."""

from __future__ import annotations

import ast
import copy
import hashlib
from dataclasses import dataclass
from enum import StrEnum

Function = ast.FunctionDef | ast.AsyncFunctionDef

_LONGEST_VALUE = 60
_FINGERPRINT_DIGITS = 16


class Kind(StrEnum):
    """What a name stands for."""

    CLASS = "class"
    FUNCTION = "function"
    PROPERTY = "property"
    FIELD = "field"
    """Of a class, assigned in its body."""
    ATTRIBUTE = "attribute"
    """Of an instance, assigned in a method."""
    CONSTANT = "constant"
    MODULE = "module"
    SETTING = "setting"
    """A flag or an environment variable."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What a version of SGLang says of one name.

    `place` is where it is defined, `module:Class` or a module; `signature` the parameters of what
    can be called or the value of what has one; `body` a fingerprint of what a function does.
    """

    kind: Kind
    place: str
    signature: str = ""
    body: str = ""


def of_function(node: Function, place: str) -> Fact:
    """Parameters with their defaults and without types, and a fingerprint."""
    decorators = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
    if decorators & {"property", "cached_property"}:
        return Fact(Kind.PROPERTY, place, body=fingerprint(node))
    return Fact(Kind.FUNCTION, place, parameters(node.args), fingerprint(node))


def parameters(arguments: ast.arguments) -> str:
    """`(self, batch, *, size=1)`: no types, since changing one breaks nobody."""
    return f"({ast.unparse(_WithoutTypes().visit(copy.deepcopy(arguments)))})"


def value(node: ast.expr | None) -> str:
    """The source of an assigned value; of a long one, a fingerprint."""
    if node is None:
        return ""
    text = ast.unparse(node)
    return text if len(text) <= _LONGEST_VALUE else f"'sha256 {_digest(text)}'"


def fingerprint(node: Function) -> str:
    """Of what a function does: neither comments, nor docstrings, nor types, nor layout count."""
    plain = _WithoutTypes().visit(copy.deepcopy(node))
    return _digest("\n".join(_shape(part) for part in (*plain.decorator_list, *plain.body)))


class _WithoutTypes(ast.NodeTransformer):
    """Takes away what is there for readers and checkers only."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self._strip(node)
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AsyncFunctionDef:
        self._strip(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        return ast.copy_location(ast.Assign([node.target], node.value), node)

    def _strip(self, node: Function) -> None:
        node.returns = None
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        self.generic_visit(node)


def _shape(node: object) -> str:
    """Syntax as text, the same in all versions of Python: they differ in fields that are empty."""
    if isinstance(node, list):
        return f"[{','.join(map(_shape, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [f"{k}={_shape(v)}" for k, v in ast.iter_fields(node) if v not in (None, [])]
    return f"{type(node).__name__}({','.join(fields)})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_FINGERPRINT_DIGITS]

"""Whether what is called by one signature can be called by another."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass

from seam.usage import Calls


@dataclass(frozen=True, slots=True)
class Signature:
    """Parameters in order; `required` are those without a default."""

    positional: tuple[str, ...]
    named: frozenset[str]
    required: frozenset[str]
    stars: frozenset[str]
    """Of `*` and `**`, those that it has."""

    @classmethod
    def parse(cls, text: str) -> Signature:
        """From text as `facts.parameters` makes it."""
        arguments = _arguments(text)
        positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        bare = positional[: len(positional) - len(arguments.defaults)]
        pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        stars = [s for s, a in (("*", arguments.vararg), ("**", arguments.kwarg)) if a is not None]
        return cls(
            positional=tuple(positional),
            named=frozenset(a.arg for a in arguments.kwonlyargs),
            required=frozenset([*bare, *(a.arg for a, default in pairs if default is None)]),
            stars=frozenset(stars),
        )

    def serves_callers_of(self, old: Signature) -> bool:
        """Whether every call that suits `old` suits this one as well."""
        return (
            self.positional[: len(old.positional)] == old.positional
            and old.named <= self.named | set(self.positional)
            and old.stars <= self.stars
            and self.required <= old.required
        )

    def serves(self, calls: Calls, old: Signature) -> bool:
        """Whether `calls`, which suit `old`, suit this one as well."""
        if calls.spread:
            return self.serves_callers_of(old)
        bound = int(old.positional[:1] in (("self",), ("cls",)))
        count = min(calls.positional + bound, len(old.positional))
        # Of what a class of ours is called with, some is for itself alone.
        given = calls.keywords & (old.named | set(old.positional))
        known = self.named | set(self.positional)
        return (
            self.positional[:count] == old.positional[:count]
            and (given <= known or "**" in self.stars)
            and self.required <= old.required
        )

    def same_parameters(self, other: Signature) -> bool:
        """Whether they differ in default values at most."""
        return (self.positional, self.named, self.stars, self.required) == (
            other.positional,
            other.named,
            other.stars,
            other.required,
        )


_MAX_SHOWN = 160
"""Characters of a signature that a person reads; of longer ones only what differs is shown."""


def differing(was: str, now: str) -> tuple[str, str]:
    """Two texts to show beside each other; of long signatures, the parameters that differ."""
    if max(len(was), len(now)) <= _MAX_SHOWN or not (was + now).startswith("("):
        return was, now
    old, new = _parts(was), _parts(now)
    return _shortened(part for part in old if part not in new), _shortened(
        part for part in new if part not in old
    )


def _shortened(parts: Iterable[str]) -> str:
    return f"({', '.join(['...', *parts])})"


def _parts(text: str) -> list[str]:
    """The parameters of a signature, each with its default."""
    arguments = _arguments(text)
    positional = [*arguments.posonlyargs, *arguments.args]
    bare: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = zip(
        (*positional, *arguments.kwonlyargs),
        (*bare, *arguments.defaults, *arguments.kw_defaults),
        strict=True,
    )
    return [a.arg if default is None else f"{a.arg}={ast.unparse(default)}" for a, default in pairs]


def _arguments(text: str) -> ast.arguments:
    (node,) = ast.parse(f"def f{text}: ...").body
    assert isinstance(node, ast.FunctionDef)
    return node.args

"""What the seam's own code says: which words its files have, and with what it calls things."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from seam.table import Entry, Use


@dataclass
class Calls:
    """All calls of one name together."""

    positional: int = 0
    """The most arguments by position, without `self`."""
    keywords: set[str] = field(default_factory=set)
    spread: bool = False
    """Some call has `*` or `**`, so that the rest is not to be known."""

    def add(self, node: ast.Call) -> None:
        """Take in one more call."""
        self.positional = max(self.positional, len(node.args))
        self.keywords |= {keyword.arg for keyword in node.keywords if keyword.arg}
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        self.spread |= starred or any(keyword.arg is None for keyword in node.keywords)


@dataclass(frozen=True, slots=True)
class Usage:
    """Names of files by the words that their code has, and calls by the name that is called.

    To construct a class of ours is to call the class of SGLang's that it inherits from.
    """

    words: Mapping[str, list[str]]
    calls: Mapping[str, Calls]

    def files(self, entry: Entry) -> list[str]:
        """Files that may be concerned; of a name that none has, those that name its class."""
        mirrored = entry.uses == {Use.MIRRORS} or entry.name.startswith("__")
        own = "" if mirrored else entry.name
        return list(self.words.get(own, ()) or self.words.get(entry.owner, ()))

    def calls_of(self, entry: Entry) -> Calls | None:
        """How the seam calls it; None if nothing in it does."""
        return self.calls.get(entry.owner if entry.name == "__init__" else entry.name)


def usage_of(seam: Path) -> Usage:
    """Read all files of the seam; comments and docstrings are left out."""
    words: defaultdict[str, list[str]] = defaultdict(list)
    calls: defaultdict[str, Calls] = defaultdict(Calls)
    trees = {file.name: ast.parse(file.read_text()) for file in sorted(seam.glob("*.py"))}
    bases = {name: base for tree in trees.values() for name, base in _bases(tree)}
    for name, tree in trees.items():
        for word in set(_words(tree)) - {""}:
            words[word].append(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (called := _last_name(node.func)):
                calls[bases.get(called, called)].add(node)
    return Usage(dict(words), dict(calls))


def _bases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from ((node.name, _last_name(base)) for base in node.bases)


def _last_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""


def _words(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.FunctionDef(name=word):
                yield word
            case ast.keyword(arg=str(word)):
                yield word
            case ast.alias(name=dotted):
                yield from dotted.split(".")
            case ast.Constant(value=str(text)) if "\n" not in text and " " not in text:
                yield text
                yield from re.findall(r"\w+", text)
            case _:
                pass

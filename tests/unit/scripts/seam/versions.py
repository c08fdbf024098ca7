"""Two versions of a small package that stands for SGLang, and code that uses it."""

from __future__ import annotations

import textwrap
from pathlib import Path

from seam.compare import Finding, compare, facts_of
from seam.source import Source
from seam.table import Entry, Use
from seam.usage import Usage, usage_of

MODULE = "sglang.srt.thing"

OLD = '''
    from sglang.srt.helpers import helper

    LIMIT = 5

    class Base:
        def __init__(self, size, color="red"):
            self.size = size

        def inherited(self): ...

    class Thing(Base):
        count: int = 1

        @property
        def half(self):
            return self.size / 2

        def run(self, batch, *, fast: bool = False) -> int:
            """Says what it does."""
            self.state, other = batch, None  # and so on
            return len(batch)

    def make(first, second=None):
        return Thing(first)
'''


class Rig:
    """Two versions of one module, and code of ours that uses it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.write("old", "thing", OLD)
        self.write("old", "helpers", "def helper(): ...\n")
        self.use("")

    def write(self, version: str, module: str, text: str) -> None:
        file = self._folder / version / "sglang" / "srt" / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))

    def use(self, code: str) -> None:
        seam = self._folder / "seam"
        seam.mkdir(exist_ok=True)
        (seam / "ours.py").write_text(textwrap.dedent(code))

    @property
    def usage(self) -> Usage:
        return usage_of(self._folder / "seam")

    def findings(self, *entries: Entry) -> list[Finding]:
        """Between `old` and `new`, of which `helpers` is the same where it says nothing."""
        self.write("new", "__init__", "")
        pinned = facts_of(entries, Source(self._folder / "old"))
        return compare(entries, pinned, Source(self._folder / "new"), self.usage)

    def finding(self, entry: Entry) -> Finding:
        (only,) = self.findings(entry)
        return only


def entry(name: str, *uses: Use, owner: str = "", module: str = MODULE) -> Entry:
    return Entry(f"{module}:{owner}" if owner else module, name, frozenset(uses), "", "things")


def replaced(*pairs: tuple[str, str]) -> str:
    text = OLD
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text

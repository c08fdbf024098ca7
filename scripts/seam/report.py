"""A comparison as text for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from seam.compare import Change, Finding
from seam.patches import Trial
from seam.signature import differing
from seam.usage import Usage

_WORDS = {
    Change.GONE: "gone",
    Change.MOVED: "moved",
    Change.SIGNATURE: "changed in signature",
    Change.PARAMETERS: "with other parameters, which our calls do not notice",
    Change.VALUE: "with another default or value",
    Change.BODY: "changed in body",
}

_INDENT = " " * 14


class Row(TypedDict):
    """One finding in JSON."""

    name: str
    change: str
    breaks: bool
    was: str
    now: str
    uses: list[str]
    why: str
    files: list[str]


class PatchRow(TypedDict):
    """One patch in JSON; `problem` is git's."""

    name: str
    applies: bool
    files: list[str]
    problem: str


class Document(TypedDict):
    """The whole comparison in JSON."""

    version: str
    pinned: str
    names: int
    counts: dict[str, int]
    breaks: int
    changes: list[Row]
    patches: list[PatchRow]


@dataclass(frozen=True, slots=True)
class Report:
    """What is different in `version` from the `pinned` one; `names` is how many were compared."""

    version: str
    pinned: str
    names: int
    findings: Sequence[Finding]
    patches: Sequence[Trial]
    usage: Usage

    @property
    def broken(self) -> bool:
        """Whether something has to be done before this version can be used."""
        return any(f.breaks for f in self.findings) or any(p.problem for p in self.patches)

    def text(self) -> str:
        """Counts, then the list of work, worst first."""
        return "\n".join([*self._summary(), *self._table(), *self._patches()])

    def document(self) -> Document:
        """The same for programs."""
        counts = Counter(finding.change for finding in self.findings)
        return Document(
            version=self.version,
            pinned=self.pinned,
            names=self.names,
            counts={change.value: counts[change] for change in Change},
            breaks=sum(finding.breaks for finding in self.findings),
            changes=[self._row(finding) for finding in self.findings],
            patches=[
                PatchRow(name=p.name, applies=not p.problem, files=list(p.files), problem=p.problem)
                for p in self.patches
            ],
        )

    def _summary(self) -> Iterator[str]:
        counts = Counter(finding.change for finding in self.findings)
        breaks = sum(finding.breaks for finding in self.findings)
        yield f"SGLang {self.version}, compared with {self.pinned}, which is pinned"
        yield f"{self.names:5} names that the seam stands on"
        yield f"{self.names - len(self.findings):5} unchanged"
        for change in Change:
            if counts[change]:
                yield f"{counts[change]:5} {_WORDS[change]}"
        yield f"{breaks:5} that break something"
        fit = sum(not trial.problem for trial in self.patches)
        yield f"{fit:5} of {len(self.patches)} patches apply"
        yield ""

    def _table(self) -> Iterator[str]:
        if not self.findings:
            yield "All names are what they were: there is nothing in this table."
            return
        for title, breaks in (("What breaks", True), ("What to look at", False)):
            rows = [finding for finding in self.findings if finding.breaks is breaks]
            if rows:
                yield title
                for finding in rows:
                    yield from self._lines(finding)
                yield ""

    def _lines(self, finding: Finding) -> Iterator[str]:
        entry = finding.entry
        files = ", ".join(self.usage.files(entry)) or f"contract/{entry.file}.toml"
        yield f"  {finding.change:10}  {entry.key.removeprefix('sglang.srt.')}"
        yield f"{_INDENT}{', '.join(sorted(entry.uses))} in {files}"
        if entry.why:
            yield f"{_INDENT}({entry.why})"
        if finding.change is Change.MOVED:
            yield f"{_INDENT}now {finding.now}"
        elif finding.change is not Change.GONE and (finding.was or finding.now):
            was, now = differing(finding.was, finding.now)
            yield f"{_INDENT}was {was}"
            yield f"{_INDENT}now {now}"

    def _patches(self) -> Iterator[str]:
        failed = [trial for trial in self.patches if trial.problem]
        if failed:
            yield "Patches that do not apply"
        for trial in failed:
            yield f"  {trial.name}"
            yield from (f"{_INDENT}{line}" for line in trial.problem.splitlines())

    def _row(self, finding: Finding) -> Row:
        return Row(
            name=finding.entry.key,
            change=finding.change.value,
            breaks=finding.breaks,
            was=finding.was,
            now=finding.now,
            uses=sorted(finding.entry.uses),
            why=finding.entry.why,
            files=self.usage.files(finding.entry),
        )

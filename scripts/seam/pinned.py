"""What the pinned SGLang says of every name, kept beside the tables and rewritten by a command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from seam.errors import SeamError
from seam.facts import Fact, Kind
from seam.table import Entry


def read_pinned(folder: Path, version: str) -> dict[str, Fact]:
    """Facts by key; raises `SeamError` if they are not those of `version`."""
    facts: dict[str, Fact] = {}
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text())
        if record["sglang"] != version:
            raise SeamError(
                f"{file.name} is of SGLang {record['sglang']}, and {version} is pinned: "
                "run scripts/seam_report.py --update"
            )
        for key, (kind, *texts) in record["names"].items():
            facts[key] = Fact(Kind(kind), *texts)
    return facts


def write_pinned(
    folder: Path, version: str, entries: Sequence[Entry], facts: Mapping[str, Fact]
) -> None:
    """One file for each table, one line for each name."""
    for table in sorted({entry.file for entry in entries}):
        lines = [
            f"  {json.dumps(e.key)}: {json.dumps(_row(facts[e.key]))}"
            for e in entries
            if e.file == table
        ]
        names = ",\n".join(lines)
        text = f'{{"sglang": {json.dumps(version)}, "names": {{\n{names}\n}}}}\n'
        (folder / f"{table}.json").write_text(text)


def _row(fact: Fact) -> list[str]:
    row = [fact.kind.value, fact.place, fact.signature, fact.body]
    while not row[-1]:
        row.pop()
    return row

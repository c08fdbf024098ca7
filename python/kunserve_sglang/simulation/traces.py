"""Request traces that others published: arrival times and lengths, no text.

Three formats are read, each by the names of its columns: Azure (CSV `TIMESTAMP`), BurstGPT (CSV
`Timestamp`) and Mooncake (JSON lines).
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from kunserve_sglang.policy.service_level import UNNAMED, ServiceLevel


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace. Equal leading `blocks` mean a shared prefix, a block a number.

    `level` are the limits that it names itself.
    """

    arrival_s: float
    prompt_len: int
    output_len: int
    blocks: tuple[int, ...] = ()
    level: ServiceLevel = UNNAMED


def load_trace(path: Path) -> list[TraceRow]:
    """All requests, in order of arrival, the first at 0; `ValueError` for an unknown format."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        if first.lstrip().startswith("{"):
            rows = [_mooncake(json.loads(line)) for line in file if line.strip()]
        else:
            rows = list(_csv_rows(csv.DictReader(file), path))
    return _from_zero(rows)


def window(rows: Sequence[TraceRow], start_s: float, length_s: float) -> list[TraceRow]:
    """The requests that arrive in `[start_s, start_s + length_s)`, with times from its start."""
    return [
        replace(row, arrival_s=row.arrival_s - start_s)
        for row in rows
        if start_s <= row.arrival_s < start_s + length_s
    ]


def scale(
    rows: Iterable[TraceRow],
    *,
    prompt: float = 1.0,
    output: float = 1.0,
    time: float = 1.0,
    max_total: int | None = None,
) -> list[TraceRow]:
    """Rows with lengths and times multiplied, so that a trace fits a smaller model or machine.

    Requests of more than `max_total` tokens after scaling are cut, the prompt last.
    """
    scaled: list[TraceRow] = []
    for row in rows:
        prompt_len = max(1, round(row.prompt_len * prompt))
        output_len = max(1, round(row.output_len * output))
        if max_total is not None:
            prompt_len = min(prompt_len, max_total - 1)
            output_len = min(output_len, max_total - prompt_len)
        arrival_s = row.arrival_s * time
        scaled.append(TraceRow(arrival_s, prompt_len, output_len, row.blocks))
    return scaled


def multiply(
    rows: Sequence[TraceRow], factor: float, *, seed: int, jitter_s: float = 1.0
) -> list[TraceRow]:
    """`factor` times as many requests in the same time, with the bursts where they were.

    Each row is repeated `factor` times, the fraction by chance; copies arrive up to `jitter_s`
    later. A factor below 1 leaves requests out.
    """
    chance = random.Random(seed)
    found: list[TraceRow] = []
    for row in rows:
        whole, part = divmod(factor, 1.0)
        count = int(whole) + (chance.random() < part)
        for copy in range(count):
            later = chance.random() * jitter_s if copy else 0.0
            found.append(replace(row, arrival_s=row.arrival_s + later))
    found.sort(key=lambda row: row.arrival_s)
    return found


def _csv_rows(reader: csv.DictReader[str], path: Path) -> Iterable[TraceRow]:
    columns = set(reader.fieldnames or ())
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        for row in reader:
            at = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
            yield TraceRow(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
    elif {"Timestamp", "Request tokens", "Response tokens"} <= columns:
        for row in reader:
            prompt, output = int(row["Request tokens"]), int(row["Response tokens"])
            if prompt > 0 and output > 0:  # the others are failed calls
                yield TraceRow(float(row["Timestamp"]), prompt, output)
    else:
        raise ValueError(f"{path}: no known trace format has the columns {sorted(columns)}")


def _mooncake(record: dict[str, object]) -> TraceRow:
    blocks = record.get("hash_ids", [])
    if not isinstance(blocks, list):
        raise ValueError(f"hash_ids is no list: {blocks!r}")
    return TraceRow(
        arrival_s=float(str(record["timestamp"])) / 1e3,
        prompt_len=int(str(record["input_length"])),
        output_len=int(str(record["output_length"])),
        blocks=tuple(int(b) for b in blocks),
    )


def _from_zero(rows: list[TraceRow]) -> list[TraceRow]:
    rows.sort(key=lambda row: row.arrival_s)
    origin = rows[0].arrival_s if rows else 0.0
    return [replace(row, arrival_s=row.arrival_s - origin) for row in rows]

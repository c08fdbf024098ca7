"""Trace loaders on small files of each format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark.prompts import PromptSource
from benchmark.traces import TraceRow, load_trace, scale, to_requests, window

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:46.9951690,374,44
2023-11-16 18:16:47.4951690,1,2
"""

BURST_GPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
7,ChatGPT,100,0,100,Conversation log
45,GPT-4,1087,230,1317,API log
"""

BURST_GPT_3 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Log Type
5.5,a,1.5,ChatGPT,472,18,API log
6.5,b,0,ChatGPT,0,0,API log
8.0,a,2,ChatGPT,10,20,API log
"""


class Numbers(PromptSource):
    """Counts up instead of quoting."""

    def __init__(self) -> None:
        self._count = 0

    def tokens(self, length: int) -> tuple[int, ...]:
        first, self._count = self._count, self._count + length
        return tuple(range(first, self._count))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AZURE, [TraceRow(0.0, 374, 44), TraceRow(4.0, 396, 109), TraceRow(60.5, 1, 2)]),
        (BURST_GPT, [TraceRow(0.0, 472, 18), TraceRow(40.0, 1087, 230)]),
        (BURST_GPT_3, [TraceRow(0.0, 472, 18), TraceRow(2.5, 10, 20)]),
    ],
)
def test_csv_formats(tmp_path: Path, text: str, expected: list[TraceRow]) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)

    assert load_trace(path) == expected


def test_mooncake(tmp_path: Path) -> None:
    records = [
        {"timestamp": 1500, "input_length": 1100, "output_length": 7, "hash_ids": [1, 2, 3]},
        {"timestamp": 1000, "input_length": 600, "output_length": 5, "hash_ids": [1, 9]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n")

    assert load_trace(path) == [
        TraceRow(0.0, 600, 5, (1, 9)),
        TraceRow(0.5, 1100, 7, (1, 2, 3)),
    ]


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("when,what\n1,2\n")

    with pytest.raises(ValueError, match=r"no known trace format.*'what', 'when'"):
        load_trace(path)


def test_an_empty_trace_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")

    assert load_trace(path) == []


def test_window_and_scale() -> None:
    rows = [TraceRow(float(t), 100 * (t + 1), 40) for t in range(5)]

    assert window(rows, 1.0, 2.0) == [TraceRow(0.0, 200, 40), TraceRow(1.0, 300, 40)]
    assert scale(rows[:1], prompt=0.5, output=0.001, time=2.0) == [TraceRow(0.0, 50, 1)]
    assert scale(rows[4:], time=0.5, max_total=120) == [TraceRow(2.0, 119, 1)]
    assert scale(rows[:1], max_total=120) == [TraceRow(0.0, 100, 20)]


def test_requests_share_prefixes_where_the_trace_does() -> None:
    rows = [TraceRow(0.0, 10, 1, (7, 8, 9)), TraceRow(1.0, 7, 1, (7, 5)), TraceRow(2.0, 6, 1)]

    first, second, third = to_requests(rows, Numbers(), block_tokens=4)

    assert [len(r.prompt) for r in (first, second, third)] == [10, 7, 6]
    assert first.prompt[:4] == second.prompt[:4]
    assert first.prompt[4] != second.prompt[4]
    assert third.prompt[0] not in first.prompt

"""Traces as requests with made-up prompts; `kunserve_sglang.simulation.traces` reads the files."""

from __future__ import annotations

from collections.abc import Iterable

from benchmark.prompts import PromptSource
from benchmark.workload import Request
from kunserve_sglang.simulation.traces import TraceRow, load_trace, scale, window

__all__ = ["MOONCAKE_BLOCK_TOKENS", "TraceRow", "load_trace", "scale", "to_requests", "window"]

MOONCAKE_BLOCK_TOKENS = 512


def to_requests(
    rows: Iterable[TraceRow],
    prompts: PromptSource,
    block_tokens: int = MOONCAKE_BLOCK_TOKENS,
) -> list[Request]:
    """Requests with made-up prompts of the right lengths, sharing prefixes where the trace does.

    Pass a smaller `block_tokens` for a trace whose prompts were scaled down.
    """
    blocks: dict[int, tuple[int, ...]] = {}
    requests: list[Request] = []
    for row in rows:
        ids: tuple[int, ...] = ()
        for number in row.blocks:
            if len(ids) >= row.prompt_len:
                break
            if number not in blocks:
                blocks[number] = prompts.tokens(block_tokens)
            ids += blocks[number]
        if len(ids) < row.prompt_len:
            ids += prompts.tokens(row.prompt_len - len(ids))
        requests.append(
            Request(row.arrival_s, ids[: row.prompt_len], row.prompt_len, row.output_len)
        )
    return requests

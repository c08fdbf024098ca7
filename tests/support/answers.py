"""What the requests of a scheduler have come to, as SGLang would tell their clients."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kunserve_sglang.sglang_seam.containment import REQUEST_FAILED
from tests.support.any_run import RULED_OUT
from tests.support.script import Output

_NEVER_RAN = "Aborted by AbortReq."
"""SGLang's word for a request that it runs on another prompt, only to be rid of it."""


def output_of(request: Any, *, aborted: bool) -> Output:
    """Of one that has ended, by an abort of the test's or otherwise."""
    reason = request.finished_reason
    if getattr(reason, "message", None) == _NEVER_RAN:
        return Output((), "abort", 0)
    return Output(
        tuple(request.output_ids_through_stop),
        "abort" if aborted else _end(reason.to_json()),
        request.cached_tokens,
        _logprobs(request),
        {} if reason is None else reason.to_json(),
        request.hidden_states,
    )


def _end(reason: dict[str, Any]) -> str:
    return "failed" if reason.get("err_type") == REQUEST_FAILED else str(reason["type"])


def _logprobs(request: Any) -> dict[str, Any]:
    """Of its prompt and its output; empty if it did not ask.

    Of tokens that a grammar rules out, all equally unlikely, any may be among the most likely.
    """
    if not request.return_logprob:
        return {}
    record = asdict(request.logprob)
    for kind in ("input", "output"):
        names = f"{kind}_top_logprobs_val", f"{kind}_top_logprobs_idx"
        rows = zip(*(record[name] or () for name in names), strict=True)
        possible = [
            [(v, i) for v, i in zip(vals, idxs, strict=True) if v > RULED_OUT] if vals else vals
            for vals, idxs in rows
        ]
        record[names[0]] = [row and [v for v, _ in row] for row in possible]
        record[names[1]] = [row and [i for _, i in row] for row in possible]
    return record

"""What an answer has in common with that of any other run that is right."""

from __future__ import annotations

from typing import Any

_OF_THE_RUN = {
    "id",
    "created",
    "e2e_latency",
    "response_sent_to_client_ts",
    "cached_tokens",
    "cached_tokens_details",
    "num_retractions",
}
"""What differs between two runs that are both right: names, clocks, and who found what cached."""

RULED_OUT = -1e9
"""No logprob of a token that may come is as low; of those that a grammar rules out, all equally
unlikely, any may be among the most likely."""


def of_any_run(value: Any) -> Any:
    """`value` without what differs between two runs that are both right."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in _OF_THE_RUN and not _as_low(v)}
        return {k: of_any_run(v) for k, v in kept.items()}
    if isinstance(value, (list, tuple)):
        return [of_any_run(v) for v in value if not _ruled_out(v)]
    return value


def _ruled_out(entry: Any) -> bool:
    """Whether this is the logprob of a token that may not come."""
    if isinstance(entry, dict):
        return _as_low(entry.get("logprob"))
    return isinstance(entry, (list, tuple)) and len(entry) == 3 and _as_low(entry[0])


def _as_low(value: Any) -> bool:
    return isinstance(value, float) and value <= RULED_OUT


def by_choice(piece: Any) -> list[tuple[int, Any]]:
    """Choices of one answer come in an order of their own in each run."""
    if isinstance(piece, list):  # several prompts or choices at once
        return list(enumerate(piece))
    if not isinstance(piece, dict):
        return [(-1, piece)]
    choices = piece.get("choices", ())
    if len(choices) == 1:
        return [(choices[0]["index"], piece)]
    return [(piece.get("index", -1), piece)]

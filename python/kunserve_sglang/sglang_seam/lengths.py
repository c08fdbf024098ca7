"""How long an SGLang request may get. Its length now is `Req.seqlen`: its prompt and output."""

from __future__ import annotations

from typing import Any


def most_output(request: Any) -> int:
    """Tokens it may still produce."""
    left: int = request.sampling_params.max_new_tokens - len(request.output_ids)
    return max(0, left)


def in_the_end(request: Any) -> int:
    """Slots it may need at most, with the one that SGLang wants free beside them."""
    length: int = request.seqlen
    return length + most_output(request) + 1

"""How long an SGLang request may get. Its length now is `Req.seqlen`: its prompt and output."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

from kunserve_sglang.core.layout import in_blocks


def max_output(request: Any) -> int:
    """Tokens it may still produce."""
    left: int = request.sampling_params.max_new_tokens - len(request.output_ids)
    return max(0, left)


def in_the_end(request: Any, page_size: int) -> int:
    """Slots it may need at most, with the block that SGLang wants free beside them."""
    length: int = request.seqlen
    return in_blocks(length + max_output(request), page_size) + page_size


def needed_to_admit(request: Any, page_size: int, *, cached: bool) -> int:
    """Slots that have to be free, or the request's own cached prefix, before SGLang admits it.

    It expects no answer to be longer than a certain length, unless the request says that it will be
    and no prefix is `cached`.
    """
    output = max_output(request)
    if cached or not request.sampling_params.ignore_eos:
        output = min(output, CLIP_MAX_NEW_TOKENS)
    length: int = request.seqlen
    return length + output + page_size

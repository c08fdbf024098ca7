"""Requests that begin with tokens which another instance has made: the scheduler's side.

They are like those that were retracted: computed again from all that they have, and whatever
follows tokens as they are made (grammar, counts of reasoning) has to have seen them.
"""

from __future__ import annotations

from array import array
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from kunserve_sglang.sglang_seam.journal import OUTPUTS


def begin_with_outputs(request: Any, think_end_id: int | None) -> None:
    """Before a request is queued: if an instance has made some of its tokens, it has them."""
    custom = request.sampling_params.custom_params
    if not isinstance(custom, dict) or OUTPUTS not in custom:
        return
    tokens = custom.pop(OUTPUTS)
    if request.to_finish is not None:
        return
    request.output_ids = array("q", tokens)
    if request.return_logprob:
        # Their logprobs have been delivered, and so have those of the prompt.
        logprob = request.logprob
        for values in (
            *(logprob.output_token_logprobs_val, logprob.output_token_logprobs_idx),
            *(logprob.output_top_logprobs_val, logprob.output_top_logprobs_idx),
            *(logprob.output_token_ids_logprobs_val, logprob.output_token_ids_logprobs_idx),
        ):
            values.extend([None] * len(tokens))
        request.send_output_token_logprobs_offset = len(tokens)
        request.input_logprob_sent = True
        request.logprob_start_len = -1
    if request.grammar is not None:
        _accept(request, tokens)
    if request.require_reasoning and think_end_id is not None:
        request.update_reasoning_tokens(list(tokens), think_end_id)
    request.reset_for_retract()


def _accept(request: Any, tokens: list[int]) -> None:
    """Let its grammar have them; one that does not fit ends the request, as it does in a step."""
    try:
        for token in tokens:
            request.grammar.accept_token(token)
    except ValueError:
        request.to_finish = FINISH_ABORT()

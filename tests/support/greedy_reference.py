"""Greedy decoding with penalties by transformers and by hand: nothing of SGLang takes part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def _model(path: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def greedy(
    path: Path,
    prompt: Sequence[int],
    tokens: int,
    *,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    stop_token_ids: Sequence[int] = (),
) -> tuple[int, ...]:
    """The next `tokens` tokens, fewer if one of `stop_token_ids` comes up.

    Penalties are about what has been produced, not about the prompt. Frequency and presence are
    taken from the logits; then those of known tokens are divided by `repetition_penalty` where they
    are positive and multiplied by it where they are not. Before `min_new_tokens` nothing stops.
    """
    model, produced = _model(path), list[int]()
    known, step = None, list(prompt)
    while len(produced) < tokens:
        out = model(torch.tensor([step]), past_key_values=known, use_cache=True)
        known, logits = out.past_key_values, out.logits[0, -1].clone()
        for token in set(produced):
            logits[token] -= frequency_penalty * produced.count(token) + presence_penalty
            positive = bool(logits[token] > 0)
            logits[token] *= 1 / repetition_penalty if positive else repetition_penalty
        if len(produced) < min_new_tokens:
            logits[list(stop_token_ids)] = -torch.inf
        step = [int(logits.argmax())]
        produced += step
        if step[0] in stop_token_ids:
            break
    return tuple(produced)

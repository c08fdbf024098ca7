"""A small Llama with random weights: real SGLang code, milliseconds a step."""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LAYERS = 8
VOCABULARY = 512


def build(
    folder: Path,
    *,
    hidden: int = 64,
    intermediate: int = 128,
    layers: int = LAYERS,
    words: Sequence[str] = (),
) -> Path:
    """Write the model to `folder` and return it. Same weights every time.

    `words` are tokens of their own, in place of its last ones.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(20260101)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.4,
        torch_dtype="float32",
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    _tokenizer(words).save_pretrained(folder)
    return folder


def _tokenizer(whole: Sequence[str]) -> Any:
    """Single characters, single bytes of others, then pairs of small letters.

    These are what random answers are made of: a character may be cut by a step.
    """
    from tokenizers import (  # type: ignore[import-untyped]
        AddedToken,
        Tokenizer,
        decoders,
        models,
    )
    from transformers import PreTrainedTokenizerFast

    pairs = map("".join, itertools.product(string.ascii_lowercase, repeat=2))
    pieces = [f"<0x{byte:02X}>" for byte in "é€🙃".encode()]
    words = ["<unk>", "<s>", "</s>", *filter(str.isprintable, string.printable), *pieces, *pairs]
    words = [*words[: VOCABULARY - len(whole)], *whole]
    known = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=known, merges=[], unk_token="<unk>"))
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in whole])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    turns = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }} {% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=turns, **special)

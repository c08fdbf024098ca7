"""Prompts of a wanted length, cut from English text that ships with Python."""

from __future__ import annotations

import random
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer  # type: ignore[import-untyped]


class PromptSource:
    """Hands out consecutive slices of a text, so that no two prompts begin alike.

    The order of the text's parts depends on `seed`, and so does every prompt. The text has some
    110,000 tokens; after that it starts over a few words further on.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        parts = [topics[name] for name in sorted(topics)]
        random.Random(seed).shuffle(parts)
        self._text = "\n".join(parts)
        encoding = tokenizer.encode(self._text, add_special_tokens=False)
        self._ids: list[int] = encoding.ids
        self._offsets: list[tuple[int, int]] = encoding.offsets
        self._next = 0

    def text(self, length: int) -> tuple[str, int]:
        """The next prompt of about `length` tokens, and how many a server will count in it."""
        start, end = self._advance(length)
        text = self._text[self._offsets[start][0] : self._offsets[end - 1][1]].strip()
        return text, len(self._tokenizer.encode(text).ids)

    def tokens(self, length: int) -> tuple[int, ...]:
        """The next prompt of exactly `length` token ids, however long."""
        ids: list[int] = []
        while len(ids) < length:
            start, end = self._advance(min(length - len(ids), len(self._ids) // 2))
            ids += self._ids[start:end]
        return tuple(ids)

    def _advance(self, length: int) -> tuple[int, int]:
        if not 0 < length <= len(self._ids):
            raise ValueError(f"no prompt of {length} tokens in a text of {len(self._ids)}")
        if self._next + length > len(self._ids):
            # Elsewhere than at the last start, or the prefix cache would serve the second round.
            self._next = (self._next + length) % 997
        start = self._next
        self._next += length
        return start, self._next


def load_tokenizer(model_path: Path) -> Tokenizer:
    """The tokenizer of a model folder; raises `FileNotFoundError` if it has no `tokenizer.json`."""
    path = model_path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer.json in {model_path}")
    return Tokenizer.from_file(str(path))

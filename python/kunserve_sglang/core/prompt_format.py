"""What prompts are made tokens with, wherever that happens."""

from __future__ import annotations

import msgspec


class PromptFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How instances make tokens of prompts: the tokenizer's folder, and SGLang's `--chat-template`.

    Without the latter, the template is the one in the folder.
    """

    folder: str
    chat_template: str | None = None

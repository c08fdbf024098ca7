"""When a request is to have its first token, and what becomes of those that will not."""

from __future__ import annotations

import msgspec

from kunserve_sglang.core.bounds import Count, Real

_HOPE = 0.5
"""Of a limit: whoever has waited for longer has hardly time left to be computed in, beside others
and after what has begun already."""

_PATIENCE = 3.0
"""Limits after which one that was put off is put off no more: nobody waits for ever."""


class FirstTokenLimit(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds to the first token; 0: there is no limit.

    That is for prompts of up to `tokens` tokens, and longer ones get more in proportion. With 0,
    all get the same.
    """

    ms: Real = 0.0
    tokens: Count = 0

    def of(self, prompt: int) -> float:
        """Milliseconds for a prompt of so many tokens."""
        return self.ms * max(1.0, prompt / self.tokens) if self.tokens else self.ms

    def past(self, prompt: int, waited_ms: float) -> bool:
        """Whether a request that has waited so long goes after those that can still make it."""
        limit = self.of(prompt)
        return limit > 0 and _HOPE * limit < waited_ms <= _PATIENCE * limit

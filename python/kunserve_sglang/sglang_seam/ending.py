"""An instance that was asked to end is gone as soon as nothing is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

_INTERVAL_S = 0.1
_SGLANG_INTERVAL_S = 5.0


def end_promptly(tokenizer_manager: Any) -> None:
    """SGLang looks every five seconds whether it was asked, and as often whether it may go."""
    original = tokenizer_manager.sigterm_watchdog
    tokenizer_manager.sigterm_watchdog = partial(_watch, original, tokenizer_manager)


async def _watch(original: Callable[[], Awaitable[None]], manager: Any) -> None:
    while not manager.gracefully_exit:  # noqa: ASYNC110 (a flag of SGLang's)
        await asyncio.sleep(_INTERVAL_S)
    # What takes longer than one look of SGLang's is for SGLang to wait for, or not.
    looks = int(_SGLANG_INTERVAL_S / _INTERVAL_S)
    while manager.rid_to_state and (looks := looks - 1):  # noqa: ASYNC110 (so is this)
        await asyncio.sleep(_INTERVAL_S)
    await original()

"""Conversations of several turns behind shared system prompts, and what a cluster makes of them.

Conversations begin when their time has come, however busy the server is; inside one, a turn follows
the answer to the turn before, which is part of its prompt, after a pause.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from benchmark.prompts import PromptSource

_READ_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Conversation:
    """`system` and `questions` are texts; `pauses_s[i]` passes before question i, in seconds."""

    start_s: float
    system: str
    questions: tuple[str, ...]
    pauses_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How many conversations of what shape; lengths in tokens, times in seconds."""

    conversations: int
    starts_within_s: float
    system_prompts: int
    system_len: int
    turns: int
    question_len: int
    answer_len: int
    mean_pause_s: float


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer; an `error` that is not empty means that there was none."""

    turn: int
    ttft_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    text: str = ""
    error: str = ""


def conversations(mix: Mix, prompts: PromptSource, seed: int) -> list[Conversation]:
    """Every system prompt begins as many conversations as any other, in random order."""
    chance = random.Random(seed)
    systems = [prompts.text(mix.system_len)[0] for _ in range(mix.system_prompts)]
    order = [systems[i % len(systems)] for i in range(mix.conversations)]
    chance.shuffle(order)
    return [
        Conversation(
            start_s=chance.random() * mix.starts_within_s,
            system=system,
            questions=tuple(prompts.text(mix.question_len)[0] for _ in range(mix.turns)),
            pauses_s=tuple(chance.expovariate(1 / mix.mean_pause_s) for _ in range(mix.turns)),
        )
        for system in order
    ]


async def hold(
    url: str, planned: Sequence[Conversation], *, answer_len: int, timeout_s: float = 120
) -> list[Turn]:
    """Hold all conversations at their times; returns all turns. One that fails ends its own."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, read_bufsize=_READ_BUFFER
    ) as session:
        origin = time.perf_counter()
        held = await asyncio.gather(*(_hold(session, url, c, origin, answer_len) for c in planned))
    return [turn for turns in held for turn in turns]


async def _hold(
    session: aiohttp.ClientSession, url: str, talk: Conversation, origin: float, answer_len: int
) -> list[Turn]:
    await asyncio.sleep(origin + talk.start_s - time.perf_counter())
    text, turns = talk.system, list[Turn]()
    for number, (question, pause) in enumerate(zip(talk.questions, talk.pauses_s, strict=True)):
        if number:
            await asyncio.sleep(pause)
        text = f"{text}\n\nQuestion: {question}\nAnswer:"
        turn = await _ask(session, url, number, text, answer_len)
        turns.append(turn)
        if turn.error:
            break
        text += turn.text
    return turns


async def _ask(
    session: aiohttp.ClientSession, url: str, number: int, prompt: str, answer_len: int
) -> Turn:
    body = {
        "text": prompt,
        "sampling_params": {"max_new_tokens": answer_len, "temperature": 0, "ignore_eos": True},
        "stream": True,
    }
    started = time.perf_counter()
    ttft, event = 0.0, {}
    try:
        async with session.post(f"{url}/generate", json=body) as response:
            if response.status != 200:
                return Turn(number, error=f"HTTP {response.status}")
            async for line in response.content:
                data = line.removeprefix(b"data:").strip()
                if not data or data == b"[DONE]":
                    continue
                ttft = ttft or time.perf_counter() - started
                event = json.loads(data)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        return Turn(number, error=f"{type(error).__name__}: {error}")
    about = event.get("meta_info")
    if about is None:
        return Turn(number, error=str(event.get("error", "no answer"))[:200])
    return Turn(
        number,
        ttft_s=ttft,
        prompt_tokens=about["prompt_tokens"],
        cached_tokens=about["cached_tokens"],
        text=event["text"],
    )

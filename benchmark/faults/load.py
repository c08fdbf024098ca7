"""The requests of a cell: half of them streams, half answered whole, some with seeded sampling."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmark.experiment import RunError
from benchmark.faults.cells import LoadKind
from benchmark.faults.verdicts import Answer
from benchmark.prompts import PromptSource, load_tokenizer

STREAMS, PLAIN = 24, 24
_PROMPTS = 13
"""The seed of prompts to which the tiny model has no two answers that are about equally likely."""

_PROMPT_TOKENS = (16, 48)
_COMMON_TOKENS = 320
"""A common prefix keeps requests together: nobody else has it cached."""

_TAIL_TOKENS = 6
_SEEDED_EVERY = 4
_DRAWN = {"temperature": 0.8, "top_k": 40}
"""Without a limit SGLang draws by the ids of tokens, and by their ranks where another request of
the batch has one, as greedy ones do: then what a seed draws would depend on the batch."""

_AGAIN_S = 0.2
_UNDER_WAY = 409
"""The router has not noticed yet that the client's connection has ended."""

_BROKEN = (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request as it is sent. `completed`: to `/v1/completions`, whose streams bring text."""

    path: str
    body: dict[str, Any]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def completed(self) -> bool:
        return self.path == "/v1/completions"

    @property
    def drawn(self) -> bool:
        """Whether its tokens are drawn by a seed; else they are greedy."""
        return "seed" in self.body or "sampling_seed" in self._sampling

    @property
    def weighed(self) -> dict[str, Any]:
        """The same for `/generate`, with the two likeliest of the tokens at each place."""
        body = self.body
        tokens = body.get("max_tokens") or self._sampling["max_new_tokens"]
        sampling = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
        return {
            "input_ids": body.get("prompt") or body["input_ids"],
            "sampling_params": sampling,
            "return_logprob": True,
            "top_logprobs_num": 2,
        }

    @property
    def _sampling(self) -> dict[str, Any]:
        return dict(self.body.get("sampling_params", {}))


def asks(model: Path, tokens: int, kind: LoadKind, *, completions: bool = True) -> list[Ask]:
    """The requests of every cell, the same each time.

    `tokens` are the new ones of the longest; the shortest gets two thirds. Those that begin in a
    group get half as many, since its steps take so much longer. Gathered ones begin alike, so that
    one instance gets them all. Of seeded ones every fourth is drawn by a seed. Without
    `completions` all go to `/generate`.
    """
    gathered, seeded, grouped = kind
    tokens = tokens // 2 if grouped else tokens
    most = tokens * 2 // 3 if gathered else tokens  # steps of so large a batch are long
    source = PromptSource(load_tokenizer(model), seed=_PROMPTS)
    common = source.tokens(_COMMON_TOKENS) if gathered else ()
    made = []
    for number in range(STREAMS + PLAIN):
        low, high = _PROMPT_TOKENS
        own = _TAIL_TOKENS if gathered else low + number * (high - low) // (STREAMS + PLAIN)
        prompt = [*common, *source.tokens(own)]
        length = most - (number % 8) * most // 24
        by_seed = seeded and number % _SEEDED_EVERY == 0
        streams = number < STREAMS
        if completions and streams and number % 2 and not gathered:
            made.append(_completion(prompt, length, number if by_seed else None))
        else:
            made.append(_generation(prompt, length, number if by_seed else None, streams=streams))
    return made


def _generation(prompt: list[int], length: int, seed: int | None, *, streams: bool) -> Ask:
    sampling: dict[str, Any] = {"max_new_tokens": length, "ignore_eos": True, "temperature": 0}
    if seed is not None:
        sampling |= {"sampling_seed": seed, **_DRAWN}
    return Ask("/generate", {"input_ids": prompt, "sampling_params": sampling, "stream": streams})


def _completion(prompt: list[int], length: int, seed: int | None) -> Ask:
    body = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": length,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    if seed is not None:
        body |= {"seed": seed, **_DRAWN}
    return Ask("/v1/completions", body)


class Clients:
    """Context manager: sends requests to one URL; those that end with the connection may ask again.

    Who may, up to `again` times, names its request by an `Idempotency-Key`, so that it gets the
    answer that is being made.
    """

    def __init__(self, url: str, key: str, limit_s: float) -> None:
        """No answer is waited for longer than `limit_s`."""
        self._url = url
        self._limit_s = limit_s
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Clients:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=1 << 22,
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def send(self, asked: Sequence[Ask], *, again: int = 0) -> list[_Sent]:
        """All at once; each has its answer and the task that completes it."""
        sent = []
        for ask in asked:
            answer = Answer(time.monotonic())
            task = asyncio.create_task(self._answer(ask, answer, again))
            sent.append(_Sent(answer, task))
        return sent

    async def all(self, asked: Sequence[Ask]) -> list[Answer]:
        """All at once, until they have ended."""
        sent = self.send(asked)
        await asyncio.gather(*(s.task for s in sent))
        return [s.answer for s in sent]

    async def margin(self, ask: Ask) -> float:
        """By how much the likeliest token of a greedy answer leads, in nats, where it is least.

        Raises `RunError` if there is no answer.
        """
        assert self._session is not None
        async with self._session.post(self._url + "/generate", json=ask.weighed) as response:
            if response.status != 200:
                raise RunError(f"no logprobs: {response.status} {(await response.text())[:200]}")
            places = (await response.json())["meta_info"]["output_top_logprobs"]
        return min(float(first[0]) - float(second[0]) for first, second in places)

    async def _answer(self, ask: Ask, answer: Answer, again: int) -> None:
        named = {"Idempotency-Key": uuid.uuid4().hex} if again else {}
        try:
            async with asyncio.timeout(self._limit_s):
                while True:
                    await self._ask(ask, answer, named)
                    if not answer.cut or answer.asked > again:
                        break
                    await asyncio.sleep(_AGAIN_S)
                    answer.begins_again()
        except TimeoutError:
            answer.error = f"no answer within {self._limit_s:g} s"
        answer.ended = time.monotonic()

    async def _ask(self, ask: Ask, answer: Answer, named: dict[str, str]) -> None:
        assert self._session is not None
        url = self._url + ask.path
        try:
            async with self._session.post(url, json=ask.body, headers=named) as response:
                if response.status == _UNDER_WAY:
                    answer.cut = True
                elif response.status != 200:
                    answer.error = f"{response.status}: {(await response.text())[:200]}"
                elif ask.streams:
                    await _read_stream(ask, answer, response)
                else:
                    answer.tokens = tuple(json.loads(await response.read())["output_ids"])
                    answer.whole = True
        except _BROKEN as error:
            answer.cut = True
            answer.error = f"{type(error).__name__}: {error}"[:200]


@dataclass(frozen=True, slots=True)
class _Sent:
    answer: Answer
    task: asyncio.Task[None]


async def _read_stream(ask: Ask, answer: Answer, response: aiohttp.ClientResponse) -> None:
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            answer.whole = True
            return
        event = json.loads(data)
        if "error" in event:
            answer.error = str(event["error"])[:200]
            return
        _take(ask, answer, event)
    answer.cut = True
    answer.error = "the stream ended before its end"


def _take(ask: Ask, answer: Answer, event: dict[str, Any]) -> None:
    """What an event brings; SGLang's own carry all tokens so far, OpenAI's the text since."""
    before = answer.tokens
    if ask.completed:
        text = "".join(choice["text"] for choice in event["choices"])
        if text:
            answer.tokens = (*before, text)
            answer.events.append((time.monotonic(), len(answer.tokens)))
        return
    reason = event["meta_info"].get("finish_reason") or {}
    if reason.get("type") == "abort":
        answer.error = f"aborted: {reason.get('message', '')}"[:200]
        return
    now = tuple(event["output_ids"])
    if len(now) <= len(before) or now[: len(before)] != before:
        answer.repeats.append((len(before), len(now), str(reason.get("type", ""))))
    answer.tokens = now
    answer.events.append((time.monotonic(), len(now)))

"""Several streams of a cluster at once, whose tokens can be compared."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore

from tests.integration.conftest import Client

REQUESTS = 4
NEW_TOKENS = 100
WAIT_S = 60


class Streams:
    """Greedy answers to prompts of made-up tokens, all begun at once."""

    def __init__(self, client: Client, pool: ThreadPoolExecutor) -> None:
        """`pool` has a thread for each of `REQUESTS`."""
        self._begun = Semaphore(0)
        self._answers = [pool.submit(self._tokens, client, n) for n in range(REQUESTS)]

    def wait_until_all_run(self) -> None:
        """All have their first token; most of them have hardly more."""
        for _ in range(REQUESTS):
            assert self._begun.acquire(timeout=WAIT_S)

    def tokens(self) -> list[list[int]]:
        """By request, when all have ended."""
        return [answer.result(WAIT_S) for answer in self._answers]

    def _tokens(self, client: Client, number: int) -> list[int]:
        body = {
            "input_ids": list(range(3 + number, 23 + number)),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": NEW_TOKENS,
                "ignore_eos": True,
            },
        }
        tokens: list[int] = []
        for event in client.stream("/generate", body):
            if not tokens:
                self._begun.release()
            tokens = event["output_ids"]
        assert len(tokens) == NEW_TOKENS
        return tokens

"""Four instances under a load that rises and falls again, with nobody but the policy to act.

The load consists of questions with short answers for which clients allow far more tokens, as most
do. What they allow decides how many slots must be there before a question gets its turn: that is
how two cores can fill the KV of four instances.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from kunserve_sglang.testing.cluster import ClusterOptions
from tests.integration.conftest import FLAGS, Client, running
from tests.support.waiting import until

SIZE = 4
BUDGET = "540MiB"
"""The parameters, and some hundred token slots. A copy that is dropped is worth 9,000."""

FITS_ALONE = 64
NEEDS_A_PAIR = 3000
"""Four of them need the slots of two copies."""
NEEDS_ALL_FOUR = 7000
"""A pair has room for one such request at a time, and its owners have several each."""
TOO_MUCH_ALONE = 600
"""More than an instance alone has, and little for a pair."""

PHASE_S = 90.0

# Answers of 25 to 39 tokens.
QUESTIONS = [
    f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    for question in (
        "Which color does the sky have?",
        "How many months does a year have?",
        "What is the largest ocean?",
        "What is the largest planet?",
        "Name a fruit.",
        "What is the chemical symbol of gold?",
    )
]


@pytest.fixture(scope="module")
def four(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    options = ClusterOptions(
        model_path=model,
        memory_budget=BUDGET,
        overload_policy="drop-always",
        num_instances=SIZE,
        sglang_flags=FLAGS,
        kunserve_flags=("--max-group-size", str(SIZE), "--checksums"),
    )
    with running(options, tmp_path_factory.mktemp("four")) as client:
        yield client


class Asking:
    """Clients that ask questions and hold every answer against the one before any drop."""

    def __init__(self, client: Client, clients: ThreadPoolExecutor) -> None:
        self._client = client
        self._clients = clients
        self._expected = {q: self._ask(q, FITS_ALONE) for q in QUESTIONS}
        self._under_way: list[Future[None]] = []
        self.answers = 0

    def ask(self, count: int, limit: int) -> None:
        """So many questions at once, for whose answers `limit` tokens are allowed."""
        self._under_way += [
            self._clients.submit(self._check, question, limit)
            for question in islice(cycle(QUESTIONS), count)
        ]

    @contextmanager
    def keep_asking(self, at_once: int, limit: int) -> Iterator[None]:
        """Inside the block, so many questions are always under way."""
        enough = threading.Event()

        def ask(questions: Sequence[str]) -> None:
            for question in cycle(questions):
                if enough.is_set():
                    break
                self._check(question, limit)

        self._under_way += [self._clients.submit(ask, QUESTIONS[i:]) for i in range(at_once)]
        try:
            yield
        finally:
            enough.set()

    def finish(self) -> None:
        """Wait until all have been answered, as expected."""
        while self._under_way:
            self._under_way.pop().result(PHASE_S)

    def _check(self, question: str, limit: int) -> None:
        assert self._ask(question, limit) == self._expected[question]
        self.answers += 1

    def _ask(self, question: str, limit: int) -> list[int]:
        answer = self._client.generate(question, limit)
        assert answer["meta_info"]["finish_reason"]["type"] == "stop", answer
        tokens: list[int] = answer["output_ids"]
        return tokens


def groups(client: Client) -> list[tuple[int, ...]]:
    return sorted({tuple(i["group"]) for i in client.status()["instances"]})


def wait_for_groups(client: Client, sizes: list[int]) -> None:
    """Until they are so, and all that belongs to it is done: the last step of a drop hands out
    memory, which requests that come before it may need as it is."""

    def done() -> bool:
        settled = client.status()["transition"] is None
        return settled and sorted(map(len, groups(client))) == sizes

    until(
        done,
        PHASE_S,
        poll_s=0.05,
        about=lambda: (groups(client), transitions(client)),
    )


def capacity(client: Client) -> int:
    return sum(i["slots"]["capacity"] for i in client.status()["instances"])


def transitions(client: Client) -> list[dict[str, Any]]:
    _, answer = client.call("GET", "/kunserve/events")
    return [e for e in answer["events"] if e["kind"] != "rebalance"]


@pytest.mark.undisturbed
def test_load_decides_how_many_share_a_copy(four: Client) -> None:
    """Alone, pairs, all four, pairs, alone; answers are the same throughout, and all arrive."""
    alone = capacity(four)
    assert groups(four) == [(0,), (1,), (2,), (3,)]
    assert alone / SIZE < TOO_MUCH_ALONE
    with ThreadPoolExecutor(32) as clients:
        asking = Asking(four, clients)
        assert transitions(four) == []

        asking.ask(SIZE, NEEDS_A_PAIR)
        wait_for_groups(four, [2, 2])
        asking.ask(3 * SIZE, NEEDS_ALL_FOUR)
        wait_for_groups(four, [4])
        with asking.keep_asking(2, TOO_MUCH_ALONE):
            wait_for_groups(four, [2, 2])
        wait_for_groups(four, [1, 1, 1, 1])
        asking.finish()
        asking.ask(SIZE, FITS_ALONE)
        asking.finish()

    assert asking.answers > 5 * SIZE
    assert capacity(four) == alone
    events = transitions(four)
    for event in events:
        assert (event["status"], event["error"]) == ("committed", "")
        planned = sum(c["slots"] for c in event["decision"]["choices"] if c["chosen"])
        assert event["capacity_after"] == event["capacity_before"] + planned
    kinds = [event["kind"] for event in events]
    assert kinds == sorted(kinds), "all drops come before the first restore"

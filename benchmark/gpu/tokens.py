"""Check of the tokens: requests that live through a drop and a restore answer as undisturbed ones.

Kernels on a GPU add up in an order that depends on the batch, so greedy answers may part at a tie
without anything being wrong: there, how far they match is only reported. In SGLang's deterministic
settings they have to be equal, as on a CPU.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import takewhile
from typing import Any

from benchmark.control import control
from benchmark.gpu.check import Bench, Findings
from benchmark.gpu.clusters import check_installed, exact_rig
from benchmark.gpu.load import answer, prompt, running, until

_SLOTS = 8000
_PROMPT = 40
_ORDINARY, _DETERMINISTIC = "ordinary", "deterministic"


def token_identity(bench: Bench, found: Findings) -> None:
    """Greedy tokens of requests that live through a drop and a restore equal undisturbed ones."""
    check_installed()
    settings: dict[str, tuple[str, ...]] = {_DETERMINISTIC: ()}
    if bench.on_gpu:
        settings = {_ORDINARY: (), _DETERMINISTIC: ("--enable-deterministic-inference",)}
    with exact_rig(bench) as rig, ExitStack() as stack:
        found.note({"parameters, millions": round(rig.geometry.parameters / 1e6, 1)})
        clusters = {name: rig.kunserve(name, _SLOTS, flags=f) for name, f in settings.items()}
        for cluster in clusters.values():
            stack.callback(cluster.stop)
            cluster.start()
        for name, cluster in clusters.items():
            stack.enter_context(cluster)
            asyncio.run(compare(cluster.url, name, found))


async def compare(
    url: str, settings: str, found: Findings, requests: int = 16, output: int = 800
) -> None:
    """Send the same prompts undisturbed and with a drop and a restore in between.

    Answers are long, since a GPU takes about a millisecond for a token of a small model.
    """
    prompts = [prompt(number, _PROMPT) for number in range(requests)]
    async with control(url) as cluster:
        await cluster.automatic(False)
        undisturbed = await asyncio.gather(*(answer(url, p, output) for p in prompts))
        await cluster.forget()
        answers = asyncio.gather(*(answer(url, p, output) for p in prompts))
        # Not all: on a busy machine the first may have ended before the last begins.
        await until(cluster, lambda status: running(status) >= requests / 2)
        dropped = await cluster.drop()
        assert running(await cluster.status()) > 0, "all had ended before the drop had"
        restored = await cluster.restore()
        moved = await answers
    assert dropped["exchanged_bytes"] > 0, "no request had KV to exchange"
    found.note(_transitions(settings, dropped, restored))
    judge(settings, undisturbed, moved, found)


def judge(
    settings: str,
    undisturbed: Sequence[list[int]],
    moved: Sequence[list[int]],
    found: Findings,
) -> None:
    """How far the answers match; all the way, if settings are deterministic."""
    matches = [matching(*pair) for pair in zip(undisturbed, moved, strict=True)]
    length = min(map(len, undisturbed))
    equal = sum(a == b for a, b in zip(undisturbed, moved, strict=True))
    found.note(
        {
            f"answers, {settings}": len(matches),
            f"equal answers, {settings}": equal,
            f"median match of {length} tokens, {settings}": statistics.median(matches),
        }
    )
    shortest = f"shortest match of {length} tokens, {settings}"
    if settings == _DETERMINISTIC:
        found.at_least(shortest, min(matches), length)
    else:
        found.note({shortest: min(matches)})


def matching(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens until they part."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _transitions(
    settings: str, dropped: dict[str, Any], restored: dict[str, Any]
) -> dict[str, float]:
    figures = {
        "slots before a drop": dropped["capacity_before"],
        "slots after it": dropped["capacity_after"],
        "slots after a restore": restored["capacity_after"],
        "KV exchanged, MB": round(dropped["exchanged_bytes"] / 1e6, 3),
        "drop, ms": dropped["duration_ms"],
        "restore, ms": restored["duration_ms"],
    }
    return {f"{name} ({settings})": value for name, value in figures.items()}

"""Seeded random schedules: what arrives when, and when layers are dropped and restored."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kunserve_sglang.testing.tiny_model import VOCABULARY
from tests.support.script import AbortRequest, Action, Add, Gate

Script = list[tuple[int, Action]]


def random_scripts(seed: int, members: int, gates: Sequence[str]) -> list[Script]:
    """One script a member; the gates come in the same order for all, at steps of their own.

    Prompts share prefixes within a member, run from a few tokens to several chunks, and arrive in
    every phase between the gates; some requests are aborted at a random step.
    """
    return [_script(random.Random(f"{seed}/{member}"), gates) for member in range(members)]


def _script(rng: random.Random, gates: Sequence[str]) -> Script:
    script: Script = []
    prefixes = [random_tokens(rng, rng.randrange(20, 150)) for _ in range(3)]
    phase_start = 0
    for phase in range(len(gates) + 1):
        length = rng.randrange(4, 24)
        for i in range(rng.randrange(1, 5)):
            rid = f"p{phase}r{i}"
            prefix = rng.choice(prefixes)
            prompt = prefix[: rng.randrange(1, len(prefix) + 1)]
            prompt += random_tokens(rng, rng.choice((1, 7, 30, 130)))
            at = phase_start + rng.randrange(length)
            script.append((at, Add(rid, prompt, rng.randrange(1, 30))))
            if rng.random() < 0.15:
                script.append((at + rng.randrange(8), AbortRequest(rid)))
        phase_start += length
        if phase < len(gates):
            script.append((phase_start, Gate(gates[phase])))
    script.sort(key=lambda entry: entry[0])
    return script


def request(rng: random.Random, rid: str, prompt: int, output: int) -> Add:
    """A request with a random prompt."""
    return Add(rid, random_tokens(rng, prompt), output)


def random_tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, VOCABULARY) for _ in range(count))

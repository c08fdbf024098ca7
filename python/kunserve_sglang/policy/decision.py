"""Why a plan is as it is: what was known, what was looked at, what was chosen."""

from __future__ import annotations

import msgspec

from kunserve_sglang.core.errors import TransientError

MOST_CHOICES = 8
"""A record of a decision is for people."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One way that was looked at; `verdict` says why it was taken or left.

    `stages` is its longest pipeline, `slots` how many token slots the cluster gains by it (loses,
    if negative). `tpot_ms` is predicted, where instances have measured what they cost; `cost` is
    of a restore: token slots for each stage gained back.

    Where ways are weighed by service level, there is for each what it does to requests that are
    there and expected: the share of them within their limits, tokens a second, and milliseconds to
    the first token, for each token and to the end, of half of them; null if those never end.
    """

    what: str
    stages: int
    slots: int
    chosen: bool
    verdict: str
    tpot_ms: float | None = None
    cost: float | None = None
    ttft_ms: float | None = None
    e2e_ms: float | None = None
    attainment: float | None = None
    tokens_per_s: float | None = None


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What went into a plan, by name, and the ways that were compared; the reason is the plan's."""

    inputs: dict[str, float]
    choices: tuple[Choice, ...]


class NoPlan(TransientError):
    """Nothing can be merged or split as asked; the message says why.

    `decision` is there if ways were compared and none would do: then requests queue.
    """

    def __init__(self, message: str, decision: Decision | None = None) -> None:
        super().__init__(message)
        self.decision = decision

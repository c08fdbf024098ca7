"""What a client got, held against what it would have got without a fault. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median


@dataclass(slots=True)
class Answer:
    """What came of one request; times are seconds of one clock.

    `tokens` is what is compared: token ids, or pieces of text of a stream that has no ids. `events`
    are the times at which more came, with how much there was then; `repeats` are those that brought
    nothing, or less than there was: how much there was, is now, and why it ended, if it did. An
    answer is `whole` if the server has ended it in good order; `cut` says that its connection ended
    before, and `error` what the server said instead.
    """

    sent: float
    tokens: tuple[object, ...] = ()
    events: list[tuple[float, int]] = field(default_factory=list)
    repeats: list[tuple[int, int, str]] = field(default_factory=list)
    whole: bool = False
    cut: bool = False
    error: str = ""
    ended: float = 0.0
    asked: int = 1

    def begins_again(self) -> None:
        """Its client asks once more, and forgets what it has got."""
        self.tokens, self.events, self.repeats = (), [], []
        self.cut, self.error = False, ""
        self.asked += 1


OK, LOST, WRONG, REPEATED = "ok", "lost", "wrong", "repeated"


def verdict(answer: Answer, expected: Sequence[object]) -> str:
    """One word for one request; lost goes before wrong, and wrong before repeated."""
    if not answer.whole or answer.error or answer.cut:
        return LOST
    got, wanted = _joined(answer.tokens), _joined(expected)
    if got != wanted:
        return REPEATED if _repeats(got, wanted) else WRONG
    return REPEATED if answer.repeats else OK


def counts(answers: Iterable[Answer], expected: Iterable[Sequence[object]]) -> Counter[str]:
    """How many requests ended in which way."""
    return Counter(verdict(a, e) for a, e in zip(answers, expected, strict=True))


def first_difference(answer: Answer, expected: Sequence[object]) -> int | None:
    """Where an answer parts from what is expected, in tokens or characters; None if it does not."""
    got, wanted = _joined(answer.tokens), _joined(expected)
    if got == wanted:
        return None
    pairs = enumerate(zip(got, wanted, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(got), len(wanted)))


def _joined(tokens: Sequence[object]) -> Sequence[object]:
    """Text is the same however it was cut into pieces."""
    if tokens and all(isinstance(t, str) for t in tokens):
        return "".join(str(t) for t in tokens)
    return tuple(tokens)


def _repeats(got: Sequence[object], wanted: Sequence[object]) -> bool:
    """Whether a piece of what is wanted comes twice, and all else is as it should be."""
    more = len(got) - len(wanted)
    if more <= 0:
        return False
    return any(
        got[:end] == wanted[:end]
        and got[end : end + more] == wanted[end - more : end]
        and got[end + more :] == wanted[end:]
        for end in range(more, len(wanted) + 1)
    )


_LONGER = 5.0
_AT_LEAST_S = 0.25


def waits(answers: Iterable[Answer], struck: float) -> list[float]:
    """Seconds from a fault to the next token of each stream that it has interrupted.

    Such a stream had begun, was not at its end, and got its next token later than five of its usual
    gaps, and a quarter of a second, after the fault. Of one that never went on nothing is known.
    """
    found = []
    for answer in answers:
        before = [at for at, _ in answer.events if at <= struck]
        after = [at for at, _ in answer.events if at > struck]
        if not before or not after or answer.asked > 1:
            continue
        usual = median([b - a for a, b in pairwise(before)] or [0.0])
        if after[0] - struck > max(_AT_LEAST_S, _LONGER * usual):
            found.append(after[0] - struck)
    return found


def in_flight(answers: Iterable[Answer], at: float) -> int:
    """How many were sent and not at their end."""
    return sum(a.sent <= at < (a.ended or float("inf")) for a in answers)

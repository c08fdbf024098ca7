"""How many tokens a request will still produce, from how long answers were lately.

What clients allow (`max_new_tokens`) says little: most answers end long before. But clients that
allow the same mostly ask for the same, so answers are remembered by the power of two of their
limit, and by route where requests name one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque

_Kind = tuple[str, int]


class _History:
    """The latest lengths: in order of arrival, and sorted."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._latest: deque[int] = deque()
        self.ascending: list[int] = []

    def add(self, tokens: int) -> None:
        self._latest.append(tokens)
        insort(self.ascending, tokens)
        if len(self._latest) > self._size:
            del self.ascending[bisect_left(self.ascending, self._latest.popleft())]


class OutputLengths:
    """Remembers the `history` latest answers of each of the `kinds` latest kinds of requests.

    An answer is expected to get as long as a `quantile` of those that got this far: of many
    requests that wait for memory, few then need more than was counted on. With fewer than `least`
    answers of a kind, nothing is known.
    """

    def __init__(
        self, *, quantile: float = 0.7, least: int = 8, history: int = 256, kinds: int = 64
    ) -> None:
        self._quantile = quantile
        self._least = least
        self._size = history
        self._max_kinds = kinds
        self._histories: OrderedDict[_Kind, _History] = OrderedDict()

    def ended(self, tokens: int, limit: int, route: str = "") -> None:
        """A request that was allowed `limit` tokens has come to its own end after `tokens`."""
        for kind in {(route, limit.bit_length()), ("", limit.bit_length())}:
            history = self._histories.setdefault(kind, _History(self._size))
            history.add(tokens)
            self._histories.move_to_end(kind)
        while len(self._histories) > self._max_kinds:
            self._histories.popitem(last=False)

    def remaining(self, produced: int, limit: int, *, unknown: float, route: str = "") -> int:
        """Tokens that a request is still expected to produce after `produced` of `limit`.

        `unknown` is the part of what is left that counts where history says nothing: for kinds that
        are new, and for answers that are longer than all before.
        """
        left = max(0, limit - produced)
        lengths = self._lengths(route, limit)
        shorter = bisect_right(lengths, produced)
        longer = len(lengths) - shorter
        if not longer:
            return int(unknown * left)
        return min(left, lengths[shorter + int(self._quantile * (longer - 1))] - produced)

    def _lengths(self, route: str, limit: int) -> list[int]:
        power = limit.bit_length()
        for known in (route, ""):
            history = self._histories.get((known, power))
            if history is not None and len(history.ascending) >= self._least:
                return history.ascending
        return []

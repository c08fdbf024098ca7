"""Whether users get what they were promised: how many requests kept their limits, by class."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping

from kunserve_sglang.api.service import AttainmentSummary, ClassAttainment
from kunserve_sglang.core.service_classes import DEFAULT_CLASS, ClassLimits
from kunserve_sglang.policy.service_level import (
    UNNAMED,
    USUAL_TOKENS,
    ServiceLevel,
    StepTimes,
    Wanted,
)
from kunserve_sglang.router.http.answers import RequestError
from kunserve_sglang.router.proxy.latency import WINDOW_S, Clock
from kunserve_sglang.router.proxy.slo_headers import CLASS_HEADER

_MOST_LEVELS = 8
"""Each costs every forecast some time, and anybody may name limits of their own."""


class ServiceClass:
    """Requests of one name, with the limits that were given for them, and how many kept theirs.

    `total` counts from the start, by whether they did; of the last minute the counts of each second
    are there. `under_way` are those that have no answer yet and name no limits of their own.
    """

    def __init__(self, name: str, level: ServiceLevel) -> None:
        self.name = name
        self.level = level
        self.under_way = 0
        self.total: Counter[bool] = Counter({True: 0, False: 0})
        self._recent: deque[tuple[int, Counter[bool]]] = deque(maxlen=int(WINDOW_S))

    def add(self, now: float, *, kept: bool) -> None:
        """One more has been judged."""
        second = int(now)
        if not self._recent or self._recent[-1][0] != second:
            self._recent.append((second, Counter()))
        self._recent[-1][1][kept] += 1
        self.total[kept] += 1

    def lately(self, now: float) -> Counter[bool]:
        """Those of the last minute."""
        recent = (counts for second, counts in self._recent if second > now - WINDOW_S)
        return sum(recent, Counter())


class Attainment:
    """All classes, and the limits that hold now.

    The limits of a request are those that it names itself, else those of its class, else those by
    which the control plane decides, which says them with `decided_by`.
    """

    def __init__(self, classes: Mapping[str, ClassLimits], clock: Clock) -> None:
        self.clock = clock
        self._classes = {DEFAULT_CLASS: ServiceClass(DEFAULT_CLASS, UNNAMED)}
        for name, limits in classes.items():
            level = ServiceLevel(ttft_ms=limits.ttft_ms, tpot_ms=limits.tpot_ms)
            self._classes[name] = ServiceClass(name, level)
        self._own: Counter[ServiceLevel] = Counter()
        self.decided_by(UNNAMED, None)

    def decided_by(self, level: ServiceLevel, times: StepTimes | None) -> None:
        """The limits that were named for all, and what a lone request takes, if that is known."""
        self._level, self._times = level, times
        self._usual = level.known(times, 0.0, 0.0)

    def of(self, name: str) -> ServiceClass:
        """The class of this name. Raises `RequestError` with a 400."""
        found = self._classes.get(name)
        if found is None:
            known = ", ".join(self._classes)
            message = f"{CLASS_HEADER}: one of {known} is expected"
            raise RequestError(400, "unknown_class", message, CLASS_HEADER)
        return found

    def begins(self, each: ServiceClass, own: ServiceLevel) -> None:
        """A request of this class is under way from now on; `own` are the limits that it names."""
        if own.named:
            self._own[own.over(each.level)] += 1
        else:
            each.under_way += 1

    def ends(self, each: ServiceClass, own: ServiceLevel) -> None:
        """The same request is not any more."""
        if not own.named:
            each.under_way -= 1
            return
        level = own.over(each.level)
        self._own[level] -= 1
        if not self._own[level]:
            del self._own[level]

    def wanted(self) -> tuple[Wanted, ...]:
        """What requests under way want, by how many; of many kinds, the most common ones."""
        counts = dict(self._own)  # no `Counter`: this runs many times a second, also when idle
        for each in self._classes.values():
            if each.under_way:
                counts[each.level] = counts.get(each.level, 0) + each.under_way
        common = sorted(counts.items(), key=lambda kind: -kind[1])[:_MOST_LEVELS]
        return tuple([Wanted(level=level, requests=count) for level, count in common])

    def limits(self, level: ServiceLevel, prompt: float = 0.0, output: float = 0.0) -> ServiceLevel:
        """Of a request of these lengths for which `level` was named, as far as they are known."""
        named = level.over(self._level)
        if named is self._level and prompt + output / 2 <= USUAL_TOKENS:
            return self._usual  # of most requests
        return named.known(self._times, prompt, output)

    def promises(self, level: ServiceLevel) -> bool:
        """Whether any limit is known for a request for which `level` was named."""
        return self._times is not None or level.over(self._level).named

    def classes(self) -> Iterator[tuple[ServiceClass, ServiceLevel]]:
        """Each with the limits of a request of usual length."""
        for each in self._classes.values():
            yield each, self.limits(each.level)

    def summary(self) -> AttainmentSummary:
        """Over the last minute."""
        now = self.clock()
        classes = [_described(each, limits, now) for each, limits in self.classes()]
        return AttainmentSummary(window_s=WINDOW_S, classes=classes)


def _described(each: ServiceClass, limits: ServiceLevel, now: float) -> ClassAttainment:
    counts = each.lately(now)
    requests = counts.total()
    return ClassAttainment(
        name=each.name,
        ttft_ms=limits.ttft_ms,
        tpot_ms=limits.tpot_ms,
        requests=requests,
        kept=counts[True],
        attainment=counts[True] / requests if requests else None,
    )

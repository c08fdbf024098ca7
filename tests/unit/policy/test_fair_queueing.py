"""Shares by weight, limits, and that nobody starves: start-time fair queueing."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kunserve_sglang.core.tenants import Allowance
from kunserve_sglang.policy.fair_queueing import FairLine, Flow

MOST = 1000
"""Tokens of the largest request here."""

tokens = st.integers(1, MOST)
weights = st.lists(st.floats(0.1, 10), min_size=2, max_size=5)


def always(_: Flow[int]) -> bool:
    return True


class Backlog:
    """Tenants that always have the next request waiting, until they are told not to."""

    def __init__(self, allowances: list[Allowance], sizes: Callable[[int], int]) -> None:
        self.line: FairLine[int] = FairLine(10**9)
        self.flows = [self.line.add(a) for a in allowances]
        self.had: Counter[int] = Counter()
        self._sizes = sizes
        self._count = 0
        self._of: dict[int, tuple[int, int]] = {}

    def add(self, tenant: int) -> None:
        self._count += 1
        size = self._sizes(tenant)
        self._of[self._count] = tenant, size
        assert self.line.join(self.flows[tenant], self._count, size, 0, 0.0) is None

    def serve(self) -> int | None:
        """One request, to its end; returns whose it was."""
        item = self.line.take(always)
        if item is None:
            return None
        tenant, size = self._of[item]
        self.had[tenant] += size
        self.line.ended(self.flows[tenant], size, size)
        return tenant


@given(weights, st.randoms(use_true_random=False), st.integers(1, 80))
def test_who_waits_gets_tokens_by_weight(
    given_: list[float], chance: random.Random, rounds: int
) -> None:
    """Whatever the sizes, within the largest request of each, at every moment."""
    largest = [chance.randint(1, MOST) for _ in given_]
    backlog = Backlog(
        [Allowance(weight=w) for w in given_], lambda t: chance.randint(1, largest[t])
    )
    for tenant in range(len(given_)):
        backlog.add(tenant)
    for _ in range(rounds):
        served = backlog.serve()
        assert served is not None
        backlog.add(served)
        normal = [backlog.had[t] / w for t, w in enumerate(given_)]
        for a, w in enumerate(given_):
            for b, v in enumerate(given_):
                assert abs(normal[a] - normal[b]) <= largest[a] / w + largest[b] / v + 1e-6


@given(st.integers(1, 500), st.integers(1, MOST))
def test_a_pause_earns_nothing_and_a_burst_costs_nobody_his_turn(before: int, size: int) -> None:
    backlog = Backlog([Allowance(), Allowance()], lambda _: size)
    for _ in range(before + 100):
        backlog.add(0)
    for _ in range(before):
        assert backlog.serve() == 0
    for _ in range(100):
        backlog.add(1)
    order = [backlog.serve() for _ in range(20)]
    assert order[0] == 1, "whoever comes new has had nothing lately"
    assert order.count(1) in (10, 11), "and has no claim to what others had while it was away"


def test_what_was_served_while_nobody_waited_counts() -> None:
    """A burst that needed not wait is no debt either."""
    line: FairLine[int] = FairLine(100)
    greedy, other = line.add(Allowance()), line.add(Allowance())
    for _ in range(50):
        line.serve(greedy, 100)
    for item, flow in enumerate((greedy, other, greedy, other)):
        line.join(flow, item, 100, 0, 0.0)
    assert [line.take(always) for _ in range(4)] == [1, 0, 3, 2]


@pytest.mark.parametrize("asked", [100, 100_000])
def test_the_account_is_put_right_when_a_request_has_ended(asked: int) -> None:
    """Who asks for a thousand times what he takes gets his share all the same."""
    line: FairLine[int] = FairLine(10**6)
    flows = [line.add(Allowance()), line.add(Allowance())]
    sizes = (asked, 100)
    served: Counter[int] = Counter()
    for item in range(400):  # the even ones are of the first
        line.join(flows[item % 2], item, sizes[item % 2], 0, 0.0)
    for _ in range(200):
        taken = line.take(always)
        assert taken is not None
        tenant = taken % 2
        served[tenant] += 1
        line.ended(flows[tenant], sizes[tenant], 100)
    assert abs(served[0] - served[1]) <= 2


def test_limits_hold_and_hold_up_nobody_else() -> None:
    line: FairLine[str] = FairLine(100)
    few = line.add(Allowance(max_requests=1, weight=10))
    small = line.add(Allowance(max_tokens=100, weight=10))
    free = line.add(Allowance())
    for item, flow, size in (
        *(("few 1", few, 10), ("few 2", few, 10)),
        *(("small 1", small, 60), ("small 2", small, 60)),
        *(("free 1", free, 500), ("free 2", free, 500)),
    ):
        line.join(flow, item, size, 0, 0.0)
    assert line.ready() == 1 + 2 + 2
    taken = [line.take(lambda _: True) for _ in range(5)]
    assert set(taken) == {"few 1", "small 1", "free 1", "free 2", None}
    assert line.ready() == 0
    line.ended(few, 10, 10)
    assert line.take(lambda _: True) == "few 2"
    line.ended(small, 60, 60)
    assert line.take(lambda _: True) == "small 2"


def test_one_request_may_be_larger_than_the_limit_if_it_is_alone() -> None:
    line: FairLine[int] = FairLine(100)
    flow = line.add(Allowance(max_tokens=100))
    line.join(flow, 1, 5000, 0, 0.0)
    line.join(flow, 2, 1, 0, 0.0)
    assert line.take(lambda _: True) == 1
    assert line.take(lambda _: True) is None
    line.ended(flow, 5000, 5000)
    assert line.take(lambda _: True) == 2


def test_what_a_limit_kept_back_is_no_claim_later() -> None:
    line: FairLine[int] = FairLine(10**6)
    limited, other = line.add(Allowance(max_requests=1)), line.add(Allowance())
    line.serve(limited, 10)
    for item in range(0, 400, 2):
        line.join(limited, item, 10, 0, 0.0)
        line.join(other, item + 1, 10, 0, 0.0)
    for _ in range(100):
        taken = line.take(always)
        assert taken is not None
        assert taken % 2, "the other one has all the room"
        line.ended(other, 10, 10)
    limited.allowance = Allowance()
    order = [line.take(always) for _ in range(20)]
    assert len([i for i in order if i is not None and i % 2]) in (9, 10, 11)


def test_who_has_less_than_his_share_has_little() -> None:
    """Shares are of what is under way, as if one more tenant came."""
    line: FairLine[int] = FairLine(100)
    big, small, idle = (line.add(Allowance()) for _ in range(3))

    def little(flow: Flow[int]) -> bool:
        return line.has_little(flow, line.weights())

    assert little(idle)
    line.serve(big, 1000)
    assert not little(big), "somebody else could come at any moment"
    line.serve(small, 499)
    assert little(small), "it has less than a third"
    line.serve(small, 2)
    assert not little(small)
    assert not little(big)


def test_in_a_full_line_the_one_who_fills_it_is_turned_away() -> None:
    line: FairLine[str] = FairLine(4)
    burst, calm, heavy = line.add(Allowance()), line.add(Allowance()), line.add(Allowance(weight=9))
    for item in ("b1", "b2", "b3"):
        assert line.join(burst, item, 1, 0, 0.0) is None
    assert line.join(heavy, "h1", 1, 0, 0.0) is None
    assert line.join(burst, "b4", 1, 0, 0.0) == "b4"
    assert line.join(burst, "b5", 1, 1, 0.0) == "b3", "priorities are among one's own"
    assert line.join(calm, "c1", 1, -10, 0.0) == "b2"
    assert line.join(heavy, "h2", 1, 0, 0.0) == "b1"
    assert len(line) == 4


def test_a_tenant_with_too_many_waiting_turns_away_its_own() -> None:
    line: FairLine[str] = FairLine(10)
    flow, other = line.add(Allowance(max_queued=1)), line.add(Allowance(max_queued=0))
    assert line.join(flow, "a", 1, 0, 0.0) is None
    assert line.join(flow, "b", 1, 0, 0.0) == "b"
    assert line.join(flow, "c", 1, 1, 0.0) == "a"
    assert line.join(other, "d", 1, 10, 0.0) == "d"
    assert [line.take(lambda _: True), line.take(lambda _: True)] == ["c", None]


class AgainstAList(RuleBasedStateMachine):
    """Whatever happens, the counts are right, limits hold, and nobody is lost."""

    @initialize(limit=st.integers(0, 8), allowed=st.integers(1, 3), most=st.integers(1, MOST))
    def begin(self, limit: int, allowed: int, most: int) -> None:
        self.line: FairLine[int] = FairLine(limit)
        self.limit = limit
        self.flows = [
            self.line.add(Allowance(weight=3)),
            self.line.add(Allowance(max_requests=allowed, max_queued=2)),
            self.line.add(Allowance(max_tokens=most)),
        ]
        self.waiting: dict[int, tuple[int, int]] = {}
        self.running: deque[tuple[int, int]] = deque()
        self.count = 0

    @rule(tenant=st.integers(0, 2), size=tokens, priority=st.integers(-10, 10))
    def join(self, tenant: int, size: int, priority: int) -> None:
        self.count += 1
        before = dict(self.waiting)
        turned_away = self.line.join(self.flows[tenant], self.count, size, priority, 0.0)
        self.waiting[self.count] = tenant, size
        if turned_away is not None:
            del self.waiting[turned_away]
            own = sum(t == tenant for t, _ in before.values())
            assert len(before) == self.limit or (tenant == 1 and own == 2)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from([0, *self.waiting]))
        self.line.leave(item)
        self.waiting.pop(item, None)

    @rule()
    def take(self) -> None:
        item = self.line.take(always)
        if item is None:
            assert not any(self.flows[t].within(s) for t, s in self._firsts())
            return
        self.running.append(self.waiting.pop(item))
        _, limited, small = self.flows
        assert limited.requests <= (limited.allowance.max_requests or 0)
        assert small.requests <= 1 or small.tokens <= (small.allowance.max_tokens or 0)

    @rule(took=st.integers(0, 2 * MOST))
    def end(self, took: int) -> None:
        if self.running:
            tenant, size = self.running.popleft()
            self.line.ended(self.flows[tenant], size, took)

    @invariant()
    def counts_are_right(self) -> None:
        if not hasattr(self, "line"):
            return
        assert len(self.line) == len(self.waiting) <= max(0, self.limit)
        for tenant, flow in enumerate(self.flows):
            mine = [s for t, s in self.running if t == tenant]
            assert (flow.requests, flow.tokens) == (len(mine), sum(mine))
            assert len(flow.waiting) == sum(t == tenant for t, _ in self.waiting.values())
        assert 0 <= self.line.ready() <= len(self.waiting)

    def _firsts(self) -> list[tuple[int, int]]:
        firsts = [flow.waiting.first() for flow in self.flows]
        return [self.waiting[item] for item in firsts if item is not None]


TestAgainstAList = AgainstAList.TestCase

"""What the tenants of a router have: read from their file, and counted since it began."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from kunserve_sglang.api.tenants import TenantStatus
from kunserve_sglang.core.tenants import Tenants, read_tenants
from kunserve_sglang.policy.fair_queueing import Flow
from kunserve_sglang.policy.queueing import EndRate, retry_after_s
from kunserve_sglang.policy.recent_peak import RecentPeak
from kunserve_sglang.router.proxy.request_queue import Shed, Waiter


class TenantsFile:
    """The file that `--tenants` names; `tenants` are those that were in it when it was read."""

    def __init__(self, path: Path, taken: Iterable[str | None]) -> None:
        """No tenant may have one of the keys that are `taken`. Raises as `read_tenants`."""
        self._path = path
        self._taken = tuple(taken)
        self.read()

    def read(self) -> None:
        """Once more. Raises `ConfigurationError`, and leaves everything as it was."""
        self.tenants: Tenants = read_tenants(self._path, self._taken)


_TAKEN_RATE = 0.05
"""How fast we learn which part of what a tenant asks for it takes."""


class TenantUse:
    """One tenant: its part of the queue, and what has become of its requests.

    `requests` have ended and took `tokens`, prompts included; others were `shed`.
    """

    def __init__(self, name: str, flow: Flow[TenantWaiter], began: float) -> None:
        self.name = name
        self.flow = flow
        self.gone = False
        self.requests = 0
        self.tokens = 0
        self.shed: Counter[Shed] = Counter(dict.fromkeys(Shed, 0))
        self._ends = EndRate(began)
        self._peak = RecentPeak()
        self._taken = 1.0

    def begun(self, now: float) -> None:
        """One more is under way."""
        self._peak.observe(now, self.flow.tokens)

    def ended(self, now: float, asked: int, took: int) -> None:
        """One for which `asked` tokens were expected took so many."""
        self.requests += 1
        self.tokens += took
        self._ends.ended(now)
        self._taken += _TAKEN_RATE * (min(1.0, took / max(1, asked)) - self._taken)

    def reserve(self, now: float) -> float:
        """Tokens that it had under way lately, and has not now; as many as such requests take."""
        if now >= self._peak.over_at:
            return 0.0
        return self._taken * max(0.0, self._peak.value(now) - self.flow.tokens)

    def retry_after_s(self, now: float) -> int:
        """When those of it that wait now, or are under way, will probably have been served."""
        ahead = len(self.flow.waiting) or self.flow.requests
        return retry_after_s(ahead, self._ends.per_second(now))

    def status(self) -> TenantStatus:
        allowance = self.flow.allowance
        return TenantStatus(
            name=self.name,
            weight=allowance.weight,
            max_requests=allowance.max_requests,
            max_tokens=allowance.max_tokens,
            max_queued=allowance.max_queued,
            in_flight=self.flow.requests,
            in_flight_tokens=self.flow.tokens,
            queued=len(self.flow.waiting),
            requests=self.requests,
            tokens=self.tokens,
            rejected=self.shed.total(),
        )


class TenantWaiter(Waiter):
    """One request of a tenant, which will take so many `tokens` at most.

    It has `little` if it was let in because its tenant has little under way; then it may take of
    the share of the slots that was `kept` free.
    """

    __slots__ = ("kept", "little", "prompt", "tokens", "use")

    def __init__(self, priority: int, use: TenantUse, prompt: int, tokens: int) -> None:
        super().__init__(priority)
        self.use = use
        self.prompt = prompt
        self.tokens = tokens
        self.little = False
        self.kept = 0.0

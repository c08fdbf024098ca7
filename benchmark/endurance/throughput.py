"""What a cluster serves that has been through a lot, beside one that has not."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

from benchmark.faults.cluster import FaultedCluster
from benchmark.faults.load import Ask, Clients
from benchmark.faults.watch import Admin
from benchmark.noise import cpu_s


class Throughput(NamedTuple):
    """Of one round: tokens a second by the clock, and by the CPU time of the whole cluster."""

    per_s: float
    per_cpu_s: float


class Pair(NamedTuple):
    """Of one round at each, one right after the other."""

    worn: Throughput
    fresh: Throughput


@dataclass(frozen=True, slots=True)
class Asked:
    """A cluster with those who ask it."""

    cluster: FaultedCluster
    admin: Admin
    clients: Clients

    async def round(self, load: Sequence[Ask]) -> Throughput:
        """All of these requests at once, of which nothing is cached."""
        await self.admin.call("POST", "/flush_cache?timeout=10")
        began, cpu = time.perf_counter(), self._cpu_s()
        answers = await self.clients.all(load)
        tokens = sum(len(answer.tokens) for answer in answers)
        took, used = time.perf_counter() - began, self._cpu_s() - cpu
        return Throughput(tokens / took, tokens / used)

    def _cpu_s(self) -> float:
        launchers = (self.cluster.router, *self.cluster.launchers.values())
        return sum(cpu_s(launcher.pid) for launcher in launchers)


@asynccontextmanager
async def asked(cluster: FaultedCluster, answer_s: float) -> AsyncIterator[Asked]:
    """No answer is waited for longer than `answer_s`."""
    admin = Admin(cluster.url, cluster.key)
    try:
        async with Clients(cluster.url, cluster.key, answer_s) as clients:
            yield Asked(cluster, admin, clients)
    finally:
        await admin.close()


async def in_turns(worn: Asked, fresh: Asked, load: Sequence[Ask], rounds: int) -> list[Pair]:
    """Each is first as often as the other, so that a machine that slows down slows down both.

    A round before them does not count: some instances are new, and touch their memory first.
    """
    for each in (worn, fresh):
        await each.round(load)
    pairs = []
    for number in range(rounds):
        if number % 2:
            later = await fresh.round(load)
            pairs.append(Pair(await worn.round(load), later))
        else:
            pairs.append(Pair(await worn.round(load), await fresh.round(load)))
    return pairs

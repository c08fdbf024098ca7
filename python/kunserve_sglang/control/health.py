"""Who can take requests: a watch over the instances."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import aiohttp
import msgspec

from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.control.upstream import (
    CONNECT_TIMEOUT_S,
    HEALTH_TIMEOUT_S,
    Question,
    Reply,
    ask,
    credentials,
    open_session,
)

_TICK_S = 0.25
"""How often an instance is asked that does not serve yet, or not any more."""

_INTERVAL_S = 5.0
"""How often one that serves is asked."""

_PRESENCE_CONNECT_S = 1.25
"""A kernel answers at once; that a first packet was lost is noticed after 1 s."""

_PRESENCE_READ_S = 1.0
"""From the connection to the answer: while one waits for a busy process, its host may vanish, which
only the next connection shows. What is answered later says that it is there to `/health`."""

_PRESENCE_TIMEOUT_S = 5.0
"""Above both together: a router that is slow itself must not take one for the other."""

_PRESENCE_TRIES = 2
"""A router that stands still for a moment itself takes answers that have come for missing ones."""

_QUIET_S = 1.0
"""Reports come several times a second, but not in the middle of a long step.

With all tries, a host that has vanished is noticed within 4.5 s, whatever is being asked of it.
"""


class _ServerInfo(msgspec.Struct):
    """What a plain SGLang server says of itself, as far as it matters here."""

    max_total_num_tokens: int = 0


@dataclass(slots=True)
class _Watch:
    instance: Instance
    due: float = 0.0
    asking: bool = False
    looking: bool = False
    question: asyncio.Task[Reply] | None = None
    """For `/health`, on its way."""


class HealthWatch:
    """Asks every instance for `/health` and writes down what follows from the answer.

    A 200 says that it serves and a refused connection that it is gone, and so does a host that does
    not answer at all. A slow answer or a 503 says neither: a busy server is not a dead server. It
    is then asked for something that its HTTP process knows by itself, which shows that there is
    one. So is one that has been quiet, and so are all instances when a control connection has
    ended, so that one that is gone is noticed at once. That question has a connection of its own
    each time: one that is there already says no more of a host that has vanished than of a process
    that is busy.
    """

    def __init__(
        self, registry: Registry, session: aiohttp.ClientSession, api_key: str | None
    ) -> None:
        headers = credentials(api_key)
        self._question = Question(method="GET", path="/health", headers=headers)
        self._presence = Question(method="GET", path="/model_info", headers=headers)
        self._about = Question(method="GET", path="/server_info", headers=headers)
        self._registry = registry
        self._session = self._fresh = session
        self._watches: dict[int, _Watch] = {}

    async def run(self) -> None:
        """Watch until cancelled; a slow instance does not delay the others."""
        async with open_session(kept=False) as self._fresh, asyncio.TaskGroup() as tasks:
            while True:
                known = self._registry.instances
                self._watches = {n: w for n, w in self._watches.items() if n in known}
                for instance in known.values():
                    watch = self._watches.get(instance.number)
                    if watch is None or watch.instance is not instance:
                        # New, or a new process under an old number.
                        watch = self._watches[instance.number] = _Watch(instance)
                    if not watch.asking and self._is_due(watch):
                        watch.asking = True
                        tasks.create_task(self._ask(watch))
                    if not watch.looking and self._is_suspect(instance):
                        watch.looking = True
                        tasks.create_task(self._look(watch))
                await asyncio.sleep(_TICK_S)

    def _is_due(self, watch: _Watch) -> bool:
        return not watch.instance.liveness.alive or self._registry.now() >= watch.due

    def _is_suspect(self, instance: Instance) -> bool:
        now = self._registry.now()
        suspected = (
            now < self._registry.suspected_until or instance.liveness.silence_s(now) > _QUIET_S
        )
        return suspected and instance.liveness.alive and not instance.plain

    async def _ask(self, watch: _Watch) -> None:
        reply = await self._answer(watch)
        if reply is not None:
            await self._heed(watch, reply)
        watch.due = self._registry.now() + (_INTERVAL_S if reply is not None else 0.0)
        watch.asking = False

    async def _heed(self, watch: _Watch, reply: Reply) -> None:
        instance = watch.instance
        if reply.status == 200:
            if instance.plain and not instance.liveness.alive:
                instance.capacity = await self._capacity(instance)
            instance.liveness.serves()
        elif reply.refused and instance.liveness.served:
            instance.liveness.refuses()
        elif reply.error:
            await self._look(watch)
        if reply.status:
            instance.liveness.heard(self._registry.now())

    async def _answer(self, watch: _Watch) -> Reply | None:
        """What it says of its health; None if its host vanishes before it says anything.

        Then no answer will come, and one that is waited for would keep the instance out of service
        when its host is back. So whoever is away is asked again and again, by new connections.
        """
        connect_s = CONNECT_TIMEOUT_S if watch.instance.liveness.alive else _PRESENCE_CONNECT_S
        question = watch.question = asyncio.create_task(
            ask(self._session, watch.instance, self._question, HEALTH_TIMEOUT_S, connect_s)
        )
        try:
            await asyncio.wait([question])
        finally:
            watch.question = None
            question.cancel()
        return None if question.cancelled() else question.result()

    async def _look(self, watch: _Watch) -> None:
        """Whether its process is there at all, which even a busy one shows at once."""
        instance = watch.instance
        for _ in range(_PRESENCE_TRIES):
            reply = await ask(
                self._fresh,
                instance,
                self._presence,
                _PRESENCE_TIMEOUT_S,
                _PRESENCE_CONNECT_S,
                _PRESENCE_READ_S,
            )
            if not reply.unreachable:
                break
        if reply.status:
            instance.liveness.heard(self._registry.now())
        elif reply.refused:
            instance.liveness.refuses()
        elif reply.unreachable:
            instance.liveness.vanishes()
            if watch.question is not None:
                watch.question.cancel()
        watch.looking = False

    async def _capacity(self, instance: Instance) -> int:
        """Token slots of a plain server; 0 if it does not say."""
        reply = await ask(self._session, instance, self._about, HEALTH_TIMEOUT_S)
        try:
            return msgspec.json.decode(reply.body, type=_ServerInfo).max_total_num_tokens
        except msgspec.DecodeError:
            return 0

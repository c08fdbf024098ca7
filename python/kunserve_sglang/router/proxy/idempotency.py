"""Requests with an `Idempotency-Key`: who asks again gets the answer, and nothing runs twice.

Answers are with the instances that have made them, so that they are there for the next router, too.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Callable, Sequence

import aiohttp
import msgspec

from kunserve_sglang.control.registry import Instance, Registry
from kunserve_sglang.control.upstream import Question, Reply, ask, ask_all, credentials
from kunserve_sglang.core.kept_answers import (
    ANSWER_HEADER,
    ANSWERS_PATH,
    KEPT_S,
    AnswerName,
    KeptAnswer,
)
from kunserve_sglang.router.http.answers import RequestError
from kunserve_sglang.router.http.client_request import ClientRequest

logger = logging.getLogger(__name__)

IDEMPOTENCY_KEY = "Idempotency-Key"

_HEADER = IDEMPOTENCY_KEY.lower().encode()
_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
_METHODS = frozenset({"POST", "PUT"})

_KNOWN = 10_000
"""Of so many answers the router knows which instance has made them."""

_QUESTION_S = 2.0
_TELL_AGAIN_S = (0.05, 0.2, 1.0)
"""A request may be on its way still when its instance is told that nobody waits for it."""


class KeyedRequest:
    """A request with such a key; `at` is the instance that has it, or had it last."""

    __slots__ = ("at", "name", "request", "value")

    def __init__(self, name: str, request: str, instance_key: str) -> None:
        self.name = name
        self.request = request
        self.value = msgspec.json.encode(AnswerName(key=instance_key, name=name, request=request))
        self.at: Instance | None = None

    @property
    def header(self) -> tuple[bytes, bytes]:
        """Tells an instance to keep the answer, or to give the one that it has."""
        return ANSWER_HEADER, self.value


class IdempotencyKeys:
    """The keys of requests under way, and where the answers are to those that had one before."""

    def __init__(
        self,
        registry: Registry,
        session: aiohttp.ClientSession,
        instance_key: str,
        *,
        follows: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`follows` says that there was a router before: then nobody here knows what it has done.

        `instance_key` is what instances know the router by.
        """
        self._registry = registry
        self._session = session
        self._instance_key = instance_key
        self._clock = clock
        # A request that goes on by itself may take as long, and its answer is kept as long again.
        self._searches_until = clock() + 2 * KEPT_S if follows else 0.0
        self._under_way: dict[str, KeyedRequest] = {}
        self._made_by: dict[str, int] = {}
        self._telling: dict[asyncio.Task[None], str] = {}

    def begin(self, request: ClientRequest) -> KeyedRequest | None:
        """None for a request without a key; `end` has to follow.

        Raises `RequestError`: 400 for what is no key, 409 and 422 for one that is in use, for the
        same request and for another one.
        """
        if _HEADER not in request.headers or request.scope["method"] not in _METHODS:
            return None
        given = [value for name, value in request.scope["headers"] if name == _HEADER]
        if len(given) != 1 or not _KEY.fullmatch(given[0]):
            message = f"{IDEMPOTENCY_KEY}: 1 to 255 visible characters of ASCII are expected, once"
            raise RequestError(400, "bad_idempotency_key", message, IDEMPOTENCY_KEY)
        keyed = KeyedRequest(
            _digest(*_credentials(request), given[0]), _asked(request), self._instance_key
        )
        if (other := self._under_way.get(keyed.name)) is not None:
            _same(keyed, other.request)
            message = "the first request with this key is under way; ask again when it has ended"
            raise RequestError(409, "request_under_way", message, IDEMPOTENCY_KEY)
        self._under_way[keyed.name] = keyed
        return keyed

    def end(self, keyed: KeyedRequest | None, request: ClientRequest) -> None:
        """It has its answer, or will have none."""
        if keyed is None:
            return
        del self._under_way[keyed.name]
        if keyed.at is not None and request.ended and request.status == 200:
            self._made_by.pop(keyed.name, None)  # the latest is the last
            self._made_by[keyed.name] = keyed.at.number
            if len(self._made_by) > _KNOWN:
                del self._made_by[next(iter(self._made_by))]

    async def holder(self, keyed: KeyedRequest | None) -> Instance | None:
        """Who has the answer, or is making it. Raises `RequestError` (422)."""
        if keyed is None:
            return None
        if telling := [task for task, name in self._telling.items() if name == keyed.name]:
            await asyncio.wait(telling)  # or it would be this request that nobody waits for
        asked = self._who_may_have_it(keyed)
        question = self._question("GET", keyed)
        replies = await ask_all(self._session, asked, question, _QUESTION_S)
        for instance, reply in zip(asked, replies, strict=True):
            if (kept := _read(reply)) is not None:
                _same(keyed, kept.request)
                return instance
        return None

    def nobody_waits(self, keyed: KeyedRequest | None) -> None:
        """The client has left, or the request goes elsewhere: where it is it must not go on."""
        if keyed is not None and keyed.at is not None:
            task = asyncio.create_task(self._tell(keyed.at, self._question("DELETE", keyed)))
            self._telling[task] = keyed.name
            task.add_done_callback(self._telling.pop)

    async def close(self) -> None:
        telling = list(self._telling)
        for task in telling:
            task.cancel()
        await asyncio.gather(*telling, return_exceptions=True)

    def _who_may_have_it(self, keyed: KeyedRequest) -> Sequence[Instance]:
        known = self._registry.instances
        if (number := self._made_by.get(keyed.name)) is not None:
            found = [known[number]] if number in known else []
        else:
            found = list(known.values()) if self._clock() < self._searches_until else []
        return [i for i in found if not (i.plain or i.liveness.lost)]

    def _question(self, method: str, keyed: KeyedRequest) -> Question:
        header = ANSWER_HEADER.decode(), keyed.value.decode()
        return Question(
            method=method, path=ANSWERS_PATH, headers=[*credentials(self._instance_key), header]
        )

    async def _tell(self, instance: Instance, question: Question) -> None:
        for pause_s in (0, *_TELL_AGAIN_S):
            await asyncio.sleep(pause_s)
            reply = await ask(self._session, instance, question, _QUESTION_S)
            if reply.ok or reply.refused or reply.unreachable:
                return


def _same(keyed: KeyedRequest, request: str) -> None:
    if keyed.request != request:
        message = f"{IDEMPOTENCY_KEY}: another request has come with this key"
        raise RequestError(422, "idempotency_key_reused", message, IDEMPOTENCY_KEY)


def _credentials(request: ClientRequest) -> list[bytes]:
    """A key belongs to whom it comes from: of others' it tells nothing."""
    return [value for name, value in request.scope["headers"] if name == b"authorization"]


def _asked(request: ClientRequest) -> str:
    scope = request.scope
    target = scope["method"].encode(), scope["raw_path"], scope["query_string"]
    return _digest(*target, request.body)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()


def _read(reply: Reply) -> KeptAnswer | None:
    if not reply.ok:
        return None
    try:
        return msgspec.json.decode(reply.body, type=KeptAnswer)
    except msgspec.DecodeError:
        logger.warning("instance %d: what it says of an answer is unreadable", reply.instance)
        return None

"""Answers that are there for who asks again, after their router has ended.

An answer is made in a task of its own, and whoever waits for it is a listener: the connection that
came with the request, and others that come later with the same.
"""

from __future__ import annotations

import asyncio
import hmac
import logging

import msgspec
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kunserve_sglang.core.kept_answers import (
    ANSWER_HEADER,
    ANSWERS_PATH,
    KEPT_BYTES,
    KEPT_S,
    AnswerName,
    KeptAnswer,
)
from kunserve_sglang.sglang_seam.shared_answer import SharedAnswer

logger = logging.getLogger(__name__)


class KeptAnswers:
    """Keeps answers for whoever shows the admin key; for all others it is not there.

    What was refused or has failed is not kept, so that it can be tried again, nor is what does not
    fit into `limit` bytes together with all others; the oldest that are whole make room first.
    """

    def __init__(
        self, app: ASGIApp, key: str, limit: int = KEPT_BYTES, kept_s: float = KEPT_S
    ) -> None:
        self._app = app
        self._key = key.encode()
        self._limit = limit
        self._kept_s = kept_s
        self._answers: dict[str, SharedAnswer] = {}
        self._making: set[asyncio.Task[None]] = set()
        self.used = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = self._wanted(scope)
        if wanted is None:
            await self._app(scope, receive, send)
        elif scope["path"] == ANSWERS_PATH:
            await self._about(wanted, scope["method"])(scope, receive, send)
        else:
            body = await _whole_body(receive)
            if body is None:
                return  # nobody is there any more
            answer = self._answers.get(wanted.name)
            if answer is None or answer.request != wanted.request:
                answer = self._begin(wanted, scope, body)
            await self._listen(answer, receive, send)

    def _wanted(self, scope: Scope) -> AnswerName | None:
        value = dict(scope["headers"]).get(ANSWER_HEADER) if scope["type"] == "http" else None
        if value is None:
            return None
        try:
            wanted = msgspec.json.decode(value, type=AnswerName)
        except msgspec.DecodeError:
            return None
        return wanted if hmac.compare_digest(wanted.key.encode(), self._key) else None

    def _about(self, wanted: AnswerName, method: str) -> Response:
        answer = self._answers.get(wanted.name)
        if answer is None:
            return Response(status_code=404)
        if method == "DELETE" and not answer.whole:
            self._forget(answer)
            answer.give_up()
        return Response(msgspec.json.encode(KeptAnswer(answer.request)))

    # --- making one ---

    def _begin(self, wanted: AnswerName, scope: Scope, body: bytes) -> SharedAnswer:
        if (other := self._answers.get(wanted.name)) is not None:
            self._forget(other)
        answer = self._answers[wanted.name] = SharedAnswer(wanted, body)
        task = asyncio.create_task(self._make(answer, scope))
        self._making.add(task)
        task.add_done_callback(self._making.discard)
        return answer

    async def _make(self, answer: SharedAnswer, scope: Scope) -> None:
        async def send(message: Message) -> None:
            await self._made(answer, message)

        try:
            await self._app(scope, answer.receive, send)
        except Exception as error:  # raised where somebody listens
            if not answer.listeners:
                logger.error("an answer that nobody waits for failed", exc_info=error)
            answer.failure = error
        if not answer.whole:
            self._forget(answer)
            answer.end()

    async def _made(self, answer: SharedAnswer, message: Message) -> None:
        """A further piece of an answer."""
        answer.add(message)
        if answer.unfit:
            self._forget(answer)
        elif answer.kept:
            self._make_room(answer)
        if answer.whole and answer.kept and not answer.listeners:
            self._expire(answer)  # from now on, however long it has taken
        await answer.taken()

    def _make_room(self, answer: SharedAnswer) -> None:
        """For one that has grown."""
        self.used += answer.size - answer.counted
        answer.counted = answer.size
        if self.used <= self._limit:
            return
        for other in [a for a in self._answers.values() if a.whole and a is not answer]:
            self._forget(other)
            if self.used <= self._limit:
                return
        self._forget(answer)

    # --- keeping it ---

    async def _listen(self, answer: SharedAnswer, receive: Receive, send: Send) -> None:
        """Send all of it, unless who waits for it is gone."""
        if answer.timer is not None:
            answer.timer.cancel()
        listener = answer.listener()
        if answer.kept:
            self._make_room(answer)
        watching = asyncio.create_task(_until_left(receive))
        watching.add_done_callback(lambda _: listener.leave())
        try:
            await listener.listen(send)
            if answer.failure is not None and not listener.left:
                raise answer.failure
        finally:
            watching.cancel()
            answer.listeners.discard(listener)
            if not answer.listeners:
                self._nobody_listens(answer)

    def _nobody_listens(self, answer: SharedAnswer) -> None:
        if answer.kept:
            self._expire(answer)
        else:
            answer.give_up()

    def _expire(self, answer: SharedAnswer) -> None:
        """If nobody asks for it until then."""
        if answer.timer is not None:
            answer.timer.cancel()
        answer.timer = asyncio.get_running_loop().call_later(self._kept_s, self._forget, answer)

    def _forget(self, answer: SharedAnswer) -> None:
        """Who listens already gets the rest all the same; if nobody does, there need be none."""
        if not answer.kept:
            return
        answer.kept = False
        answer.transcript.clear()
        self.used -= answer.counted
        del self._answers[answer.name]
        if answer.timer is not None:
            answer.timer.cancel()
        if not answer.listeners:
            answer.give_up()


async def _whole_body(receive: Receive) -> bytes | None:
    """None if the client leaves before its end."""
    parts: list[bytes] = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
    return None


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def keep_answers(app: Starlette, key: str) -> None:
    """Let one server, which has not started to serve, keep answers. To be called last."""
    app.add_middleware(KeptAnswers, key=key)

"""SGLang's own endpoints that concern more than one instance."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kunserve_sglang.api.calls import Access
from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.registry import Instance
from kunserve_sglang.control.upstream import Question, Reply, ask, ask_all, credentials
from kunserve_sglang.router.admin.access import Holder, Keys
from kunserve_sglang.router.admin.exposition import merge_expositions
from kunserve_sglang.router.http.answers import error_answer, json_answer, retry_later
from kunserve_sglang.router.http.questions import question_of
from kunserve_sglang.router.proxy.prefix_index import PrefixIndex
from kunserve_sglang.router.settings import RouterConfig

_ACTION_TIMEOUT_S = 300.0
"""Some actions wait for running requests."""

_READ_TIMEOUT_S = 30.0

_ABOUT_THE_CALL = frozenset({400, 401, 403, 404, 422})
"""Statuses by which an instance says what is wrong with a call."""

_SECRETS = ("admin_api_key", "api_key", "ssl_keyfile_password")
"""Arguments of a server that `/server_info` would tell everybody."""


class Fanout:
    """Endpoints that are about more than one instance."""

    def __init__(
        self,
        control: ControlPlane,
        prefixes: PrefixIndex | None,
        session: aiohttp.ClientSession,
        config: RouterConfig,
        keys: Keys,
    ) -> None:
        self._to_own = credentials(config.instance_admin_key)
        self._to_any = credentials(config.api_key)
        self._keys = keys
        self._control = control
        self._prefixes = prefixes
        self._session = session

    async def to_all(self, request: Request) -> Response:
        """Send it to every instance; it has succeeded only if all of them say so.

        One that is lost counts too: whoever asked must not believe that it has obeyed.
        """
        everybody = [i for _, i in sorted(self._control.registry.instances.items())]
        question = await question_of(request)
        # Finished once begun, even if the caller leaves: all or none.
        replies = await asyncio.shield(
            asyncio.gather(
                *(
                    ask(self._session, i, self._on_our_account(question, i), _ACTION_TIMEOUT_S)
                    for i in everybody
                )
            )
        )
        if not replies:
            return _nobody()
        if question.path == "/flush_cache" and self._prefixes is not None:
            self._prefixes.flushed()
        for reply in replies:
            if not reply.ok:
                return error_answer(502, "instance_failed", reply.failure)
        return _pass_on(replies[0])

    async def loads(self, request: Request) -> Response:
        """`/get_load` and `/v1/loads`: SGLang's shape, each entry with its `instance`."""
        path = request.scope["path"]
        question = await self._looking(request, "/get_load" if path == "/get_loads" else path)
        available = self._control.registry.available()
        replies = await ask_all(self._session, available, question, _READ_TIMEOUT_S)
        if not replies:
            return _nobody()
        for reply in replies:
            if not reply.ok:
                return _pass_on(reply)
        if not replies[0].content_type.startswith("application/json"):
            texts = {r.instance: r.body.decode() for r in replies}
            return Response(merge_expositions(texts, "sglang"), media_type="text/plain")
        return json_answer(_labelled({r.instance: msgspec.json.decode(r.body) for r in replies}))

    async def server_info(self, request: Request) -> Response:
        """One instance's answer, and for those who may look what KunServe makes of all of them."""
        reply = await self._first(await self._looking(request, request.scope["path"]))
        if reply is None:
            return _nobody()
        if not reply.ok:
            return _pass_on(reply)
        try:
            info = msgspec.json.decode(reply.body, type=dict[str, Any])
        except msgspec.DecodeError as error:
            message = f"instance {reply.instance} answered with no server information: {error}"
            return error_answer(502, "instance_failed", message)
        info = _without_secrets(info)
        if self._keys.open(Access.READ, request):
            info["kunserve"] = self._control.status()
        return json_answer(info)

    async def by_whoever_knows(self, request: Request) -> Response:
        """`/v1/responses/{id}`: only the instance that has made a response knows it."""
        available = self._control.registry.available()
        question = await question_of(request)
        if self._keys.tenant(request.scope) is not None:
            question = _with(question, self._to_any)
        replies = await ask_all(self._session, available, question, _READ_TIMEOUT_S)
        if not replies:
            return _nobody()
        # Any answer but "there is none" is that of the one who knows.
        return _pass_on(min(replies, key=lambda r: (not r.ok, r.status in (0, 404))))

    async def _looking(self, request: Request, path: str) -> Question:
        """The caller's question, but with a key of the router's exchanged for that of servers."""
        question = await question_of(request, path)
        ours = self._keys.holder(request) in (Holder.ADMIN, Holder.READ)
        if ours or self._keys.tenant(request.scope) is not None:
            return _with(question, self._to_any)
        return question

    def _on_our_account(self, question: Question, instance: Instance) -> Question:
        """With the key that `instance` asks for; the caller's, which is the router's, stays here.

        A plain server is somebody else's: it never sees the key of our instances.
        """
        ours = self._to_any if instance.plain else self._to_own
        if not ours and not self._keys.needed(Access.CHANGE):
            return question  # the caller's credentials are for the server, if they are for anybody
        return _with(question, ours)

    async def _first(self, question: Question) -> Reply | None:
        """The answer of the first available instance that gives one."""
        reply = None
        for instance in self._control.registry.available():
            reply = await ask(self._session, instance, question, _READ_TIMEOUT_S)
            if not reply.error:
                break
        return reply


def _with(question: Question, ours: list[tuple[str, str]]) -> Question:
    """The question with these credentials, or none, in place of its own."""
    headers = [h for h in question.headers if h[0] != "authorization"]
    return msgspec.structs.replace(question, headers=[*headers, *ours])


def _without_secrets(value: Any) -> Any:
    """`value`, made of JSON types, without what servers let nobody know who has to show it."""
    if isinstance(value, list):
        return [_without_secrets(v) for v in value]
    if isinstance(value, dict):
        return {
            k: "[key]" if v and k in _SECRETS else _without_secrets(v) for k, v in value.items()
        }
    return value


def _labelled(answers: dict[int, Any]) -> Any:
    """The answers of all instances in the shape of one, with the instance in every entry."""
    sample = next(iter(answers.values()))
    if isinstance(sample, dict):
        loads = {number: answer.get("loads", []) for number, answer in answers.items()}
        return {**sample, "loads": _labelled(loads)}
    return [
        {"instance": number, **entry} for number, entries in answers.items() for entry in entries
    ]


def _pass_on(reply: Reply) -> Response:
    """A reply that says something to the caller; any other is the instance's failure."""
    if reply.ok or reply.status in _ABOUT_THE_CALL:
        return Response(reply.body, reply.status, media_type=reply.content_type or None)
    return error_answer(502, "instance_failed", reply.failure)


def _nobody() -> Response:
    return retry_later("no_instance", "no instance can take requests now")

"""SGLang's own endpoints that concern every instance, and those that KunServe rules out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kunserve_sglang.router.access import Keys
from kunserve_sglang.router.answers import error_answer, json_answer, retry_later
from kunserve_sglang.router.calls import Access
from kunserve_sglang.router.control_plane import ControlPlane
from kunserve_sglang.router.exposition import merge_expositions
from kunserve_sglang.router.upstream import Question, Reply, ask, ask_all, credentials, question_of

# Path and methods of what all instances have to do.
TO_ALL: dict[str, Sequence[str]] = {
    "/abort_request": ("POST",),
    "/configure_logging": ("GET", "POST"),
    "/continue_generation": ("POST",),
    "/flush_cache": ("GET", "POST"),
    "/freeze_gc": ("GET", "POST"),
    "/pause_generation": ("POST",),
    "/set_internal_state": ("POST", "PUT"),
    "/set_trace_level": ("GET", "POST"),
    "/slow_down": ("GET", "POST"),
    "/start_profile": ("GET", "POST"),
    "/stop_profile": ("GET", "POST"),
}

_OWN_MEMORY = "parameters and memory of the instances belong to KunServe"
_OWN_SESSION = "a session lives on one instance, and requests go to all of them"

# What would break the cluster, and why.
REFUSED: dict[str, str] = {
    "/close_session": _OWN_SESSION,
    "/destroy_weights_update_group": _OWN_MEMORY,
    "/init_weights_update_group": _OWN_MEMORY,
    "/load_lora_adapter": _OWN_MEMORY,
    "/load_lora_adapter_from_tensors": _OWN_MEMORY,
    "/open_session": _OWN_SESSION,
    "/release_memory_occupation": _OWN_MEMORY,
    "/resume_memory_occupation": _OWN_MEMORY,
    "/unload_lora_adapter": _OWN_MEMORY,
    "/update_weights_from_disk": _OWN_MEMORY,
    "/update_weights_from_distributed": _OWN_MEMORY,
    "/update_weights_from_ipc": _OWN_MEMORY,
    "/update_weights_from_tensor": _OWN_MEMORY,
}

_ACTION_TIMEOUT_S = 300.0
"""Some actions wait for running requests."""

_READ_TIMEOUT_S = 30.0


class Fanout:
    """Endpoints that are about more than one instance."""

    def __init__(
        self,
        control: ControlPlane,
        session: aiohttp.ClientSession,
        api_key: str | None,
        keys: Keys,
    ) -> None:
        self._credentials = credentials(api_key)
        self._keys = keys
        self._control = control
        self._session = session

    async def to_all(self, request: Request) -> Response:
        """Send it to every instance; it has succeeded only if all of them say so.

        One that is lost counts too: whoever asked must not believe that it has obeyed.
        """
        everybody = [i for _, i in sorted(self._control.registry.instances.items())]
        question = self._on_our_account(await question_of(request))
        # Finished once begun, even if the caller leaves: all or none.
        replies = await asyncio.shield(
            ask_all(self._session, everybody, question, _ACTION_TIMEOUT_S)
        )
        if not replies:
            return _nobody()
        if request.url.path == "/flush_cache" and self._control.prefixes is not None:
            self._control.prefixes.flushed()
        for reply in replies:
            if not reply.ok:
                return error_answer(502, "instance_failed", reply.failure)
        return _pass_on(replies[0])

    async def refused(self, request: Request) -> Response:
        path = request.url.path
        return error_answer(501, "not_supported", f"{path} is refused: {REFUSED[path]}")

    async def loads(self, request: Request) -> Response:
        """`/get_load` and `/v1/loads`: SGLang's shape, each entry with its `instance`."""
        path = "/get_load" if request.url.path == "/get_loads" else request.url.path
        question = await question_of(request, path)
        available = self._control.registry.available()
        replies = await ask_all(self._session, available, question, _READ_TIMEOUT_S)
        if not replies:
            return _nobody()
        for reply in replies:
            if reply.ok:
                continue
            if reply.status in (400, 401, 403, 404, 422):
                return _pass_on(reply)
            return error_answer(502, "instance_failed", reply.failure)
        if not replies[0].content_type.startswith("application/json"):
            texts = {r.instance: r.body.decode() for r in replies}
            return Response(merge_expositions(texts, "sglang"), media_type="text/plain")
        return json_answer(_labelled({r.instance: msgspec.json.decode(r.body) for r in replies}))

    async def server_info(self, request: Request) -> Response:
        """One instance's answer, and for those who may look what KunServe makes of all of them."""
        question = await question_of(request)
        reply = await self._first(question)
        if reply is None:
            return _nobody()
        if reply.error:
            return error_answer(502, "instance_failed", reply.failure)
        if not reply.ok:
            return _pass_on(reply)
        if not self._keys.open(Access.READ, request):
            return _pass_on(reply)
        info = msgspec.json.decode(reply.body)
        return json_answer({**info, "kunserve": self._control.status()})

    def _on_our_account(self, question: Question) -> Question:
        """The caller has shown the router its key, which the instances need not know."""
        if not self._credentials:
            return question
        headers = [h for h in question.headers if h[0] != "authorization"]
        return msgspec.structs.replace(question, headers=[*headers, *self._credentials])

    async def _first(self, question: Question) -> Reply | None:
        """The answer of the first available instance that gives one."""
        reply = None
        for instance in self._control.registry.available():
            reply = await ask(self._session, instance, question, _READ_TIMEOUT_S)
            if not reply.error:
                break
        return reply


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
    return Response(reply.body, status_code=reply.status, media_type=reply.content_type or None)


def _nobody() -> Response:
    return retry_later("no_instance", "no instance can take requests now")

"""Runs our own endpoints, which are an ASGI application, for a request that has been read."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message

from kunserve_sglang.router.http.client_request import ClientRequest


async def run_asgi(app: ASGIApp, request: ClientRequest) -> None:
    """A client that leaves does not end the call: what it has begun is carried through."""
    left = asyncio.Event()
    request.on_gone = left.set
    read = False

    async def receive() -> Message:
        nonlocal read
        if not read:
            read = True
            return {"type": "http.request", "body": request.body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            if any(b"\n" in value or b"\r" in value for _, value in headers):
                raise ValueError("a header of an answer has more than one line")
            request.start(message["status"], headers)
        elif message.get("more_body", False):
            request.write(message.get("body", b""))
        else:
            request.end(message.get("body", b""))

    await app(request.scope, receive, send)

"""A server with one endpoint, for clients under test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.test_utils import TestServer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """The address of a server that answers what asks for tokens with `handler`."""
    app = web.Application()
    for path in ("/generate", "/v1/completions"):
        app.router.add_post(path, handler)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")

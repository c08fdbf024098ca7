"""A server with one endpoint, for clients under test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.test_utils import TestServer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """The address of a server that answers `POST /generate` with `handler`."""
    app = web.Application()
    app.router.add_post("/generate", handler)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")

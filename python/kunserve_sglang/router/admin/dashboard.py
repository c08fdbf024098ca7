"""The dashboard: one page and what it loads, all of it from inside the package."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

_PAGE = "index.html"

_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}

# The page changes clusters, so it runs what came with it, and nobody else puts it into a frame.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def dashboard_routes() -> list[Route]:
    """`/dashboard`, and each of its files beneath; they are read once, at start."""
    folder = files("kunserve_sglang.router.admin") / "web"
    routes = [Route("/dashboard/", _without_slash)]
    for file in folder.iterdir():
        path = "/dashboard" if file.name == _PAGE else f"/dashboard/{file.name}"
        routes.append(Route(path, _Asset(file).get))
    return routes


class _Asset:
    """One file, as it is answered; a browser that has it already is told so."""

    def __init__(self, file: Traversable) -> None:
        self._body = file.read_bytes()
        self._media_type = _MEDIA_TYPES["." + file.name.rsplit(".", 1)[1]]
        tag = hashlib.sha256(self._body).hexdigest()[:16]
        self._headers = {**_HEADERS, "ETag": f'"{tag}"'}

    async def get(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self._headers["ETag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers=self._headers, media_type=self._media_type)


async def _without_slash(request: Request) -> Response:  # noqa: ARG001 (a Starlette endpoint)
    # Relative, as all links of the page are, so that it works below any prefix of a reverse proxy.
    return RedirectResponse("../dashboard")

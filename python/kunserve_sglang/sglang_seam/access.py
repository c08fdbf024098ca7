"""Which calls of an instance need the admin key: all that clients of a cluster have no use for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.core.paths import Lookup
from kunserve_sglang.core.routes import server_routes

_LEVEL = "_get_auth_level_from_app_and_scope"
"""By this name SGLang's middleware looks up what a request needs."""


def guard_admin_calls() -> None:
    """Let SGLang's middleware ask for the admin key by our table, in this process.

    SGLang marks endpoints one by one and has left some out; routers that it includes lose their
    marks. Raises `InternalError` if it does not look for marks where it used to: then nothing would
    be guarded.
    """
    from sglang.srt.utils import auth

    routes = server_routes(os.environ)
    clients = Lookup((path, True) for path, route in routes.items() if route.handling.open)

    def level(_app: Any, scope: Mapping[str, Any]) -> auth.AuthLevel:
        whole: str = scope["path"]
        path = whole.removeprefix(scope.get("root_path", ""))
        if clients.find(path.encode()):
            return auth.AuthLevel.NORMAL
        return auth.AuthLevel.ADMIN_OPTIONAL

    if not callable(getattr(auth, _LEVEL, None)):
        raise InternalError(f"this SGLang has no {auth.__name__}.{_LEVEL}")
    setattr(auth, _LEVEL, level)

"""Every HTTP route of one SGLang server, and how a cluster handles it. Others are refused.

The router looks up here where a request goes, an instance which ones need a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Handling(StrEnum):
    """What becomes of a call of one server's API that a cluster gets."""

    FORWARD = "forward"
    """One instance gets it as it came."""

    ANSWER = "answer"
    """The router answers, by what it knows or has asked instances."""

    TO_ALL = "to_all"
    """It acts on a server: it needs the admin key, and every instance gets it."""

    REFUSE = "refuse"
    """A cluster cannot do it, and says why."""

    HIDE = "hide"
    """As if it did not exist."""

    @property
    def open(self) -> bool:
        """Whether it takes no admin key, neither at the router nor at an instance."""
        return self in (Handling.FORWARD, Handling.ANSWER)


@dataclass(frozen=True, slots=True)
class ServerRoute:
    """A route as SGLang writes it, with all of its methods; `reason` is that of a refusal."""

    path: str
    methods: tuple[str, ...]
    handling: Handling
    reason: str = ""


_GET = ("GET",)
_POST = ("POST",)
_GET_POST = ("GET", "POST")
_POST_PUT = ("POST", "PUT")

_FORWARDED: Mapping[str, tuple[str, ...]] = {
    "/": ("GET", "HEAD"),
    "/api/chat": _POST,
    "/api/generate": _POST,
    "/api/show": _POST,
    "/api/tags": _GET,
    "/classify": _POST_PUT,
    "/detokenize": _POST,
    "/encode": _POST_PUT,
    "/generate": _POST_PUT,
    "/get_model_info": _GET,
    "/get_weight_version": _GET,
    "/invocations": _POST,
    "/model_info": _GET,
    "/openapi.json": ("GET", "HEAD"),
    "/parse_function_call": _POST,
    "/ping": _GET,
    "/separate_reasoning": _POST,
    "/tokenize": _POST,
    "/v1/audio/transcriptions": _POST,
    "/v1/chat/completions": _POST,
    "/v1/classify": _POST,
    "/v1/completions": _POST,
    "/v1/detokenize": _POST,
    "/v1/embeddings": _POST,
    "/v1/messages": _POST,
    "/v1/messages/count_tokens": _POST,
    "/v1/models": _GET,
    "/v1/models/{model:path}": _GET,
    "/v1/rerank": _POST_PUT,
    "/v1/responses": _POST,
    "/v1/score": _POST,
    "/v1/tokenize": _POST,
    "/vertex_generate": _POST,
    "/weight_version": _GET,
}

_ANSWERED: Mapping[str, tuple[str, ...]] = {
    "/docs": ("GET", "HEAD"),
    "/get_load": _GET,
    "/get_server_info": _GET,
    "/health": _GET,
    "/health_generate": _GET,
    "/server_info": _GET,
    "/v1/loads": _GET,
    "/v1/responses/{response_id}": _GET,
    "/v1/responses/{response_id}/cancel": _POST,
}

_TO_ALL: Mapping[str, tuple[str, ...]] = {
    "/abort_request": _POST,
    "/configure_logging": _GET_POST,
    "/continue_generation": _POST,
    "/flush_cache": _GET_POST,
    "/freeze_gc": _GET_POST,
    "/pause_generation": _POST,
    "/set_internal_state": _POST_PUT,
    "/set_trace_level": _GET_POST,
    "/slow_down": _GET_POST,
    "/start_profile": _GET_POST,
    "/stop_profile": _GET_POST,
}

_REFUSED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "parameters and memory of the instances belong to KunServe": {
        "/destroy_weights_update_group": _POST,
        "/get_remote_instance_transfer_engine_info": _GET,
        "/get_weights_by_name": _GET_POST,
        "/init_weights_send_group_for_remote_instance": _POST,
        "/init_weights_update_group": _POST,
        "/load_lora_adapter": _POST,
        "/load_lora_adapter_from_tensors": _POST,
        "/release_memory_occupation": _GET_POST,
        "/remote_instance_transfer_engine_info": _GET,
        "/resume_memory_occupation": _GET_POST,
        "/send_weights_to_remote_instance": _POST,
        "/unload_lora_adapter": _POST,
        "/update_weight_version": _POST,
        "/update_weights_from_disk": _POST,
        "/update_weights_from_distributed": _POST,
        "/update_weights_from_ipc": _POST,
        "/update_weights_from_tensor": _POST,
        "/weights_checker": _GET_POST,
    },
    "a session lives on one instance, and requests go to all of them": {
        "/close_session": _GET_POST,
        "/open_session": _GET_POST,
    },
    "KunServe does not support hierarchical caches": {
        "/clear_hicache_storage_backend": _GET_POST,
        "/hicache/storage-backend": ("DELETE", "GET", "PUT"),
        "/hicache/storage-backend/clear": _POST,
    },
    "KunServe does not support speculative decoding": {
        "/add_external_corpus": _POST,
        "/list_external_corpora": _GET,
        "/remove_external_corpus": _POST,
    },
    "KunServe does not support expert parallelism": {
        "/dump_expert_distribution_record": _GET_POST,
        "/is_scaling_elastic_ep": _GET,
        "/scale_elastic_ep": _POST,
        "/start_expert_distribution_record": _GET_POST,
        "/stop_expert_distribution_record": _GET_POST,
    },
    "the router does not speak WebSocket": {"/v1/realtime": _GET},
}

_HIDDEN: Mapping[str, tuple[str, ...]] = {
    "/docs/oauth2-redirect": ("GET", "HEAD"),
    "/redoc": ("GET", "HEAD"),
}

SERVER_ROUTES: tuple[ServerRoute, ...] = (
    *(ServerRoute(path, methods, Handling.FORWARD) for path, methods in _FORWARDED.items()),
    *(ServerRoute(path, methods, Handling.ANSWER) for path, methods in _ANSWERED.items()),
    *(ServerRoute(path, methods, Handling.TO_ALL) for path, methods in _TO_ALL.items()),
    *(
        ServerRoute(path, methods, Handling.REFUSE, reason)
        for reason, paths in _REFUSED.items()
        for path, methods in paths.items()
    ),
    *(ServerRoute(path, methods, Handling.HIDE) for path, methods in _HIDDEN.items()),
)
"""In the order of the documentation: by handling, then by reason, then by path."""

_RENAMED_BY: Mapping[str, str] = {
    "/": "SGLANG_OLLAMA_ROOT_ROUTE",
    "/api/chat": "SGLANG_OLLAMA_CHAT_ROUTE",
    "/api/generate": "SGLANG_OLLAMA_GENERATE_ROUTE",
    "/api/show": "SGLANG_OLLAMA_SHOW_ROUTE",
    "/api/tags": "SGLANG_OLLAMA_TAGS_ROUTE",
    "/vertex_generate": "AIP_PREDICT_ROUTE",
}
"""The environment variables by which SGLang moves some of its routes."""


def server_routes(environment: Mapping[str, str]) -> dict[str, ServerRoute]:
    """The routes of a server that was started with this environment, by path.

    A path that has been moved onto another one is that other one.
    """
    moved: dict[str, ServerRoute] = {}
    for route in SERVER_ROUTES:
        path = environment.get(_RENAMED_BY.get(route.path, ""), route.path)
        if path not in moved or not route.handling.open:
            moved[path] = route
    return moved

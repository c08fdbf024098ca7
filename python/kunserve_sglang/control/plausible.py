"""Whether a message of an instance can be true, before anybody reckons with what it says.

Its types keep numbers within bounds. What is left is what one type cannot know: who has sent it,
and whether its parts fit one another. All checks raise `msgspec.ValidationError`, as decoding does.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from msgspec import ValidationError

from kunserve_sglang.core.messages import CacheReport, Hello, Status, connection_name

_COST_TERMS = (6, 3)


def check_sender(identity: bytes, message: Hello | Status | CacheReport) -> None:
    """An instance speaks for itself, over its own connection."""
    if identity != connection_name(message.instance):
        raise ValidationError(f"{identity!r} speaks for instance {message.instance}")


def check_hello(hello: Hello) -> None:
    if len(hello.memory.layer_pages) != hello.layer_count:
        raise ValidationError("its memory has not the layers of its model")
    costs = hello.costs
    if costs is not None and (len(costs.prefill), len(costs.decode)) != _COST_TERMS:
        raise ValidationError("its cost model has not the terms of ours")
    try:
        url = urlsplit(hello.url)
        reachable = url.scheme == "http" and url.hostname and url.port
    except ValueError:
        reachable = False
    if not reachable:
        raise ValidationError("its URL leads nowhere")


def check_status(status: Status, hello: Hello) -> None:
    """`hello` is what the same instance has said of itself."""
    layout = status.layout
    if status.instance not in layout.ids or status.epoch != layout.epoch:
        raise ValidationError("its layout is none of its own")
    if len(set(layout.ids)) < len(layout.ids) or not layout.covers(hello.layer_count):
        raise ValidationError("its layout is none of its model")

"""Classes of requests with limits of their own, as flags and headers of requests name them."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from kunserve_sglang.core.errors import ConfigurationError

DEFAULT_CLASS = "default"
"""The class of requests that name none; its limits are those of the cluster."""

MOST_CLASSES = 32
"""Each has its metrics, and its counts of the last minute."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_LIMIT = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


class ClassLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds to the first token, and for each token after it, on average."""

    ttft_ms: float
    tpot_ms: float


def read_limit(text: str) -> float | None:
    """Milliseconds as people write them; None for what is no number above 0."""
    return (float(text) or None) if _LIMIT.fullmatch(text) else None


def read_classes(given: Iterable[str]) -> dict[str, ClassLimits]:
    """By name, from texts such as `chat=500:50`. Raises `ConfigurationError`."""
    classes: dict[str, ClassLimits] = {}
    for text in given:
        name, _, limits = text.partition("=")
        ttft, _, tpot = limits.partition(":")
        ttft_ms, tpot_ms = read_limit(ttft), read_limit(tpot)
        if not _NAME.fullmatch(name) or ttft_ms is None or tpot_ms is None:
            raise ConfigurationError(
                f"--slo-class {text}: NAME=TTFT_MS:TPOT_MS is expected, a name of at most 40 "
                "letters, digits and .-_, and two numbers above 0"
            )
        if name == DEFAULT_CLASS:
            raise ConfigurationError(
                f"--slo-class {text}: the limits of {name} are --slo-ttft-ms and --slo-tpot-ms"
            )
        if name in classes:
            raise ConfigurationError(f"--slo-class {text}: there is one {name} already")
        classes[name] = ClassLimits(ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    if len(classes) >= MOST_CLASSES:
        raise ConfigurationError(
            f"--slo-class: at most {MOST_CLASSES - 1} classes can be told apart"
        )
    return classes

"""The few flags of SGLang's that are read before SGLang is imported, which takes seconds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kunserve_sglang.core.errors import ConfigurationError


def wanted_device(sglang_argv: Sequence[str]) -> str:
    """Where instances are to run: SGLang's `--device`, `cpu` without it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    device: str = parser.parse_known_args(sglang_argv)[0].device
    return device


def api_key_only(sglang_argv: Sequence[str]) -> str | None:
    """SGLang's `--api-key`, the one flag that a router without instances has a use for.

    Raises `ConfigurationError` for any other.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--api-key")
    flags, rest = parser.parse_known_args(sglang_argv)
    if rest:
        raise ConfigurationError(f"{rest[0]}: with --num-instances 0 there is no instance for it")
    api_key: str | None = flags.api_key
    return api_key

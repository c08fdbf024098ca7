"""What of SGLang's flags is read before SGLang is imported, which takes seconds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def wanted_device(sglang_argv: Sequence[str]) -> str:
    """Where instances are to run: SGLang's `--device`, `cpu` without it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    device: str = parser.parse_known_args(sglang_argv)[0].device
    return device

"""Limits of this process that some tests need higher."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

_FILES = 4096


@contextmanager
def many_open_files() -> Iterator[None]:
    """In here some thousand files may be open, as far as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(_FILES, hard)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

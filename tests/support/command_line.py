"""The command line, called in the process of the test."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


class Done:
    """How a command ended, and what it wrote."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that an error is."""
        assert not self.out
        (line,) = self.err.splitlines()
        assert line.startswith("kunserve: ")
        return line


Run = Callable[..., Done]

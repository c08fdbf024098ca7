"""What came from others, could not be used, and was dropped."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class Dropped:
    """Counts what was dropped as malformed, and says why of fewer and fewer."""

    def __init__(self, what: str = "packet") -> None:
        """`what` is dropped, for people."""
        self.count = 0
        self._what = what

    def because(self, reason: object) -> None:
        """Another one."""
        self.count += 1
        if self.count & (self.count - 1) == 0:  # the first, second, fourth, eighth, ...
            logger.warning("malformed %s %d: %s", self._what, self.count, reason)

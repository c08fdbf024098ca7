"""Requests as they were when a micro-batch of theirs was launched.

SGLang applies a result by what its record of the request says at that time. Its own loops apply a
result before they launch anything that changes the record again. In cooperative mode several chunks
of one prompt are in flight, and each launch changes the record, so that the result of an early
chunk would be read by the bounds of a late one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from kunserve_sglang.core.errors import InternalError


class Launched:
    """A chunk of a prompt that is in flight, with more of its prompt to follow.

    It remembers what later launches have changed in the request's record, whatever the attributes
    are called: nobody has to know which of them SGLang reads. What other results have changed
    stays, since results come in order.
    """

    def __init__(self, request: Any) -> None:
        self.request = request
        self._then: dict[str, Any] = {}

    def overtaken(self, before: dict[str, Any]) -> None:
        """A launch has changed the record, which was `before`."""
        now = vars(self.request)
        for name, value in before.items():
            if now[name] is not value:
                self._then.setdefault(name, value)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Show SGLang the record of then, and afterwards that of now with what it has written.

        Raises `InternalError` if a later launch and the result have both written an attribute that
        is not a count: which of them is right is nothing that can be decided here.
        """
        record: dict[str, Any] = vars(self.request)
        now = {name: record[name] for name in self._then}
        record.update(self._then)
        try:
            yield
        finally:
            for name, then in self._then.items():
                record[name] = _combined(name, then, now[name], record[name])


@contextlib.contextmanager
def launching(in_flight: Iterable[Launched]) -> Iterator[None]:
    """Around all that may change the records of requests that have chunks in flight."""
    records = [(launched, dict(vars(launched.request))) for launched in in_flight]
    yield
    for launched, before in records:
        if not launched.request.finished():  # it was aborted, which is no launch
            launched.overtaken(before)


def _combined(name: str, then: Any, now: Any, written: Any) -> Any:
    """The value of `name` after later launches (`now`) and the result (`written`)."""
    if all(type(value) is int for value in (then, now, written)):
        return now + written - then  # a count: both have their share in it
    if written is then:
        return now
    raise InternalError(f"a later launch and a result have both written {name} of a request")

"""How an answer stays there for who asks again: what router and instances agree on.

A request whose client has given it an id goes to an instance with `ANSWER_HEADER`. The instance
makes its answer whether or not the connection lasts, and keeps it: the same request under the same
name gets that answer, from its beginning, and nothing is computed twice. A connection that breaks
is the end of a router; that a client has left, the router says: `DELETE` at `ANSWERS_PATH`, with
the header. `GET` there says whether there is an answer, with a `KeptAnswer`.
"""

from __future__ import annotations

import msgspec

ANSWER_HEADER = b"x-kunserve-answer"

ANSWERS_PATH = "/kunserve/answers"

KEPT_S = 120.0
"""How long an answer is kept after it was whole, or after anybody has waited for it.

The next router is there after seconds, and its clients come as soon as they notice.
"""

KEPT_BYTES = 64 << 20
"""What all answers of an instance take that it keeps, or is making."""


class AnswerName(msgspec.Struct, frozen=True):
    """Value of `ANSWER_HEADER`, as JSON.

    `key` is the admin key of the instances. `name` is of the client and of the id that it has
    given, `request` of what it asks for: digests in hexadecimal digits.
    """

    key: str
    name: str
    request: str


class KeptAnswer(msgspec.Struct, frozen=True):
    """What an instance says of an answer that it has: what was asked for, as in `AnswerName`."""

    request: str

"""How a stream that has lost its instance goes on at another: what router and instances agree on.

An instance that is asked to by `JOURNAL_HEADER`, with the admin key in it, answers streams with
that header too, and puts records into them: comment lines of server-sent events that begin with
`COMMENT`, each before the events that follow from it. The router takes them out again and keeps
them. What is in them is for instances alone.

To resume a stream the router sends the same request to another instance: the body is followed by
all records, a line each, and `RESUME_HEADER` says where it ends and what the client has got.
"""

from __future__ import annotations

import msgspec

JOURNAL_HEADER = b"x-kunserve-journal"
RESUME_HEADER = b"x-kunserve-resume"

COMMENT = b":kunserve "

NOT_RESUMABLE = b"-"
"""In place of a record: this stream cannot be resumed, and no record of it is of use."""

RESUMABLE_PATHS = frozenset(
    {"/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages"}
)


def reports_error(part: bytes) -> bool:
    """Whether there is an event in this part of a stream by which SGLang says that it has failed.

    It does so behind a 200; in a text the quotes and the end of the line would be escaped.
    """
    return b'data: {"error"' in part or b"event: error\n" in part


class Resumption(msgspec.Struct, frozen=True):
    """Value of `RESUME_HEADER`, as JSON.

    `body_bytes` is the length of the client's own body, `events` how many the client has got, and
    `created` the time that they name, in seconds of the epoch; 0 if they name none.
    """

    body_bytes: int
    events: int
    created: int = 0

"""The journal of one stream: what another instance needs to go on with it.

A record is what SGLang's tokenizer manager has handed out at once for one choice: new tokens, the
text and logprobs that belong to them. What its endpoints make of that (deltas, parsed tool calls,
usage) follows from the records in their order, so that another instance comes to the same state by
handing out the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

import msgspec

OUTPUTS = "kunserve_outputs"
"""By this name of `custom_params` the scheduler is told of tokens; no client may use it."""

_OUTPUT_LOGPROBS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")

_OF_PROMPT = (
    *("id", "prompt_tokens", "cached_tokens", "cached_tokens_details"),
    *("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"),
)
"""Fields of `meta_info` that stay as they are after a choice's first output."""


class Record(msgspec.Struct, array_like=True, omit_defaults=True):
    """What is new of choice `index`; `text` is None without a tokenizer.

    `prompt` comes with the first record of a choice: what is known of its prompt.
    """

    index: int
    tokens: list[int]
    text: str | None
    reasoning_tokens: int = 0
    finish_reason: dict[str, Any] | None = None
    logprobs: dict[str, list[Any]] | None = None
    prompt: dict[str, Any] | None = None
    prompt_token_ids: list[int] | None = None


_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Record)


def read_records(lines: bytes) -> list[Record]:
    """Raises `msgspec.DecodeError`."""
    return [_decoder.decode(line) for line in lines.splitlines()]


class StreamedChoice:
    """One choice of a stream, as far as it has been handed out."""

    __slots__ = ("first", "last", "logprobs", "text", "tokens")

    def __init__(self, first: Record) -> None:
        self.first = self.last = first
        self.tokens: list[int] = []
        self.text = "" if first.text is not None else None
        self.logprobs: dict[str, list[Any]] = {name: [] for name in first.logprobs or ()}

    def add(self, record: Record) -> None:
        self.last = record
        self.tokens += record.tokens
        if self.text is not None:
            self.text += record.text or ""
        for name, values in (record.logprobs or {}).items():
            self.logprobs.setdefault(name, []).extend(values)

    @property
    def rid(self) -> str:
        """What SGLang calls this choice."""
        return str((self.first.prompt or {})["id"])

    @property
    def finished(self) -> bool:
        return self.last.finish_reason is not None

    def output(self) -> dict[str, Any]:
        """What the tokenizer manager has handed out with the last record."""
        meta = {
            **(self.first.prompt or {}),
            "finish_reason": _as_sglang_has_it(self.last.finish_reason),
            "completion_tokens": len(self.tokens),
            "reasoning_tokens": self.last.reasoning_tokens,
        }
        output: dict[str, Any] = {"output_ids": list(self.tokens), "meta_info": meta}
        if self.text is not None:
            output["text"] = self.text
        self._put_logprobs(meta, {})
        if self.first.prompt_token_ids is not None:
            output["prompt_token_ids"] = self.first.prompt_token_ids
        return output

    def continued(self, output: dict[str, Any]) -> dict[str, Any]:
        """What this instance hands out, as if it had done so from the beginning.

        Raises `ValueError` if it does not follow from what was handed out.
        """
        meta = output["meta_info"]
        if self.text is not None and self.text.startswith(output["text"]):
            # What may become another letter is held back, and so is all of a request that failed.
            output["text"] = self.text
        elif self.text is not None and not output["text"].startswith(self.text):
            raise ValueError("the stream cannot be resumed: its tokens are read differently here")
        for name in _OF_PROMPT:
            if name in (self.first.prompt or {}):
                meta[name] = (self.first.prompt or {})[name]
        self._put_logprobs(meta, meta)
        return output

    def _put_logprobs(self, meta: dict[str, Any], more: dict[str, Any]) -> None:
        """Those of earlier tokens in front of `more`."""
        for name, values in self.logprobs.items():
            meta[name] = values + list(more.get(name) or ())
            if name == "output_token_logprobs":
                meta["output_token_logprobs_length"] = len(meta[name])


def _as_sglang_has_it(reason: dict[str, Any] | None) -> dict[str, Any] | None:
    if reason is None or not isinstance(reason.get("status_code"), int):
        return reason
    return {**reason, "status_code": HTTPStatus(reason["status_code"])}


class _Written:
    """How much of a choice is in the journal."""

    __slots__ = ("logprobs", "text", "tokens")

    def __init__(self) -> None:
        self.tokens = self.text = self.logprobs = 0


class OwnerJournal:
    """What one request's stream has handed out, until it is sent; and what it begins with.

    `earlier` are the records of the instance that had it before. With `replays` they are handed
    out once more, for endpoints that have a state; the first `skipped` events that follow have
    been delivered.
    """

    def __init__(
        self, earlier: Iterable[Record] = (), *, skipped: int = 0, replays: bool = True
    ) -> None:
        self.earlier = list(earlier)
        self.replays = replays
        self.skipped = skipped if replays else 0
        self.resumable = True
        self.begun = False
        self._choices: dict[int, _Written] = {}
        self._pending: list[bytes] = []

    def take(self) -> list[bytes]:
        """Records that are not in the stream yet."""
        pending, self._pending = self._pending, []
        return pending

    def replayed(self) -> None:
        """All of `earlier` has been handed out, and what follows from it has been sent.

        Raises `ValueError` if it was less than what has been delivered.
        """
        if self.skipped:
            self.skipped = 0  # what is said of this is to be delivered
            raise ValueError("the stream cannot be resumed: another part of it was delivered")
        for record in self.earlier:
            self._written(record.index, record.tokens, record.text, record.logprobs)

    def write(self, output: dict[str, Any]) -> None:
        """What is about to be handed out."""
        index, meta = output.get("index", 0), output["meta_info"]
        known = self._choices.get(index) or _Written()
        # Lists may have grown since, but they are what they were as far as these numbers say.
        tokens = output["output_ids"][known.tokens : meta["completion_tokens"]]
        text = output.get("text")
        logprobs = None
        if (length := meta.get("output_token_logprobs_length")) is not None:
            logprobs = {
                name: meta[name][known.logprobs : length]
                for name in _OUTPUT_LOGPROBS
                if meta.get(name) is not None
            }
        record = Record(
            index=index,
            tokens=tokens,
            text=None if text is None else text[known.text :],
            reasoning_tokens=meta.get("reasoning_tokens") or 0,
            finish_reason=meta["finish_reason"],
            logprobs=logprobs,
        )
        if index not in self._choices:
            record.prompt = {name: meta[name] for name in _OF_PROMPT if name in meta}
            record.prompt_token_ids = output.get("prompt_token_ids")
        self._written(index, tokens, record.text, logprobs)
        self._pending.append(_encode(record))

    def _written(
        self,
        index: int,
        tokens: list[int],
        text: str | None,
        logprobs: dict[str, list[Any]] | None,
    ) -> None:
        known = self._choices.setdefault(index, _Written())
        known.tokens += len(tokens)
        known.text += len(text or "")
        known.logprobs += len((logprobs or {}).get("output_token_logprobs", ()))


CURRENT: ContextVar[OwnerJournal | None] = ContextVar("journal", default=None)
"""That of the request which is being answered, if there is one."""

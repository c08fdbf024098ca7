"""What no instance should have to read in a request, because readers differ or break there.

Everything else in a body is for the instance to judge, JSON that is none included.
"""

from __future__ import annotations

import json
import math
from typing import Any, cast

import msgspec

from kunserve_sglang.router.http.answers import RequestError

MAX_ANSWERS = 8192
"""Of one request: it counts as one in every queue, and they take memory all at once."""

MAX_DEPTH = 100
"""Arrays and objects inside each other; readers give up, or end, at some depth of their own."""

_FORMS = frozenset({"/v1/audio/transcriptions"})
"""Calls that take no JSON."""

_PROMPTS = ("text", "prompt", "input_ids", "input")
_MIN_INT, _MAX_INT = -(1 << 63), (1 << 63) - 1

_BOXES = frozenset({dict, list})
_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_LONG = b"0" * len(str(_MAX_INT))
"""So many digits may be more than 64 bits."""


def check_body(path: str, body: bytes) -> dict[str, Any]:
    """Its fields; none of what is no JSON object.

    Raises `RequestError` (400), with the name of the field where there is one.
    """
    if not body or path in _FORMS:
        return {}
    document = _plain(body)
    looked_at = document is not None
    if not looked_at:
        document = _decoded(body)
    lists = body.count(b"[")
    if lists + body.count(b"{") > MAX_DEPTH:
        _check_depth(document)
    if not isinstance(document, dict):
        return {}
    if not looked_at and b"\\u" in body:
        _check_texts(document)
    sampling = document.get("sampling_params")
    if lists or "n" in document or (isinstance(sampling, dict) and "n" in sampling):
        _check_answers(document)
    return document


def _plain(body: bytes) -> Any:
    """What nearly all bodies say, at a tenth of the cost; None where a closer look is needed.

    What is written again as it came has no name twice, nor an escape for half a character. With
    spaces between its parts it has none either if no backslash comes before a `u`, and each name is
    followed by a colon: a name that is there twice leaves one too many. No number of fewer digits
    than `_LONG` is too large, save those at which the decoder fails.
    """
    if _LONG in body.translate(_DIGITS):
        return None
    try:
        document = _plain_decoder.decode(body)
        if _plain_encoder.encode(document) == body:
            return document
        plain = b"\\u" not in body and _colons(document) == body.count(b":")
        return document if plain else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _colons(value: Any) -> int:
    """How many are in its text at least, if each name is there once."""
    kind = type(value)
    if kind is dict:
        found = len(value)
        for name, item in value.items():
            found += name.count(":")
            if type(item) is str:
                found += item.count(":")
            elif type(item) in _BOXES:
                found += _colons(item)
        return found
    if kind is list:
        if value and type(value[0]) is int:
            return 0  # the tokens of a prompt; a text among them makes it too few
        return sum(map(_colons, value))
    return cast(str, value).count(":") if kind is str else 0


def _decoded(body: bytes) -> Any:
    """None if it is no JSON, as of the JSON `null`."""
    # In UTF-16 and UTF-32 one of the first bytes of JSON is 0; some instances can read these.
    if b"\0" in body[:4] or body.startswith(b"\xef\xbb\xbf"):
        raise _bad("the body has to be UTF-8, without a byte order mark")
    try:
        return _decoder.decode(body.decode())
    except UnicodeDecodeError as error:
        raise _bad(f"the body is no UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError:
        return None
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # of `int`, for thousands of digits
        raise _bad("a number in the body is too large") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise _bad("more than once", next(name for name in names if names.count(name) > 1))
    for name, value in pairs:
        kind = type(value)
        if (
            (kind is int and not _MIN_INT <= value <= _MAX_INT)
            or (kind is float and not math.isfinite(value))
            or (kind is list and not _all_fit(value))
        ):
            raise _bad("a number is too large, or is none", name)
    return fields


_decoder = json.JSONDecoder(object_pairs_hook=_object)
_plain_decoder = msgspec.json.Decoder()
_plain_encoder = msgspec.json.Encoder()


def _all_fit(values: list[Any]) -> bool:
    """Whether all numbers are within 64 bits; there may be hundreds of thousands of them."""
    if _are_ints(values):
        return _within_64_bits(values)
    return all(
        (kind := type(value)) is str
        or (kind is int and _MIN_INT <= value <= _MAX_INT)
        or (kind is float and math.isfinite(value))
        or (kind is list and _all_fit(value))
        or kind not in (int, float, list)
        for value in values
    )


def _are_ints(values: list[Any]) -> bool:
    return set(map(type, values)) == {int}


def _within_64_bits(values: list[int]) -> bool:
    return min(values) >= _MIN_INT and max(values) <= _MAX_INT


def _check_depth(document: Any) -> None:
    level = [document]
    for _ in range(MAX_DEPTH + 1):
        boxes = [value for value in level if isinstance(value, dict | list)]
        if not boxes:
            return
        level = [v for box in boxes for v in (box.values() if isinstance(box, dict) else box)]
    raise _too_deep()


def _check_texts(document: dict[str, Any]) -> None:
    """Half a surrogate pair is no character, and tokenizers raise at it."""
    for name, value in document.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _bad("half a surrogate pair is no text", name) from error


def _check_answers(document: dict[str, Any]) -> None:
    prompts = 1
    for name in _PROMPTS:
        given = document.get(name)
        # Numbers are the tokens of one prompt.
        if isinstance(given, list) and not (given and isinstance(given[0], int)):
            prompts = len(given)
            if prompts > MAX_ANSWERS:
                raise _bad(f"at most {MAX_ANSWERS} prompts in one request", name)
    sampling = document.get("sampling_params")
    for options in (document, *(sampling if isinstance(sampling, list) else [sampling])):
        n = options.get("n") if isinstance(options, dict) else None
        if isinstance(n, int) and n * prompts > MAX_ANSWERS:
            raise _bad(f"at most {MAX_ANSWERS} answers in one request", "n")


def _too_deep() -> RequestError:
    return _bad(f"the body has more than {MAX_DEPTH} arrays and objects inside each other")


def _bad(message: str, field: str | None = None) -> RequestError:
    if field is not None:
        field = field[:100].encode("ascii", "backslashreplace").decode()
        message = f"{field}: {message}"
    return RequestError(400, "bad_json", message, field)

"""The messages: ways to say where a request ends, where it goes, and which of it counts."""

from __future__ import annotations

from dataclasses import dataclass

_BODY = b'{"text":"x"}'
_TARGET = "/generate"
_JSON = b"Content-Type: application/json"
_HIDDEN = b"GET /v1/models?smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Message:
    """`requests` is how many are in it; `meaning` the target and body of the first, if any."""

    name: str
    sent: bytes
    meaning: tuple[str, bytes] | None = None
    requests: int = 1


def _with(
    name: str, *lines: bytes, body: bytes = _BODY, means: bytes | None = None, requests: int = 1
) -> Message:
    """A POST with these lines in its head, and with what follows it."""
    head = b"\r\n".join((b"POST /generate HTTP/1.1", b"Host: a", _JSON, *lines))
    meaning = None if means is None else (_TARGET, means)
    return Message(name, head + b"\r\n\r\n" + body, meaning, requests)


def _line(name: str, line: bytes, *, means: str | None = None) -> Message:
    """A GET with this first line."""
    meaning = None if means is None else (means, b"")
    return Message(name, line + b"\r\nHost: a\r\n\r\n", meaning)


_LENGTH = b"Content-Length: %d" % len(_BODY)
_CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(_BODY), _BODY)
_CHUNKED = b"Transfer-Encoding: chunked"


def _length(value: bytes) -> Message:
    shown = value.decode("latin-1").strip() or "blank"
    return _with(f"content-length {shown!r}", b"Content-Length:" + value, body=_BODY + _HIDDEN)


def _coding(value: bytes) -> Message:
    shown = value.decode("latin-1")
    return _with(f"transfer-encoding {shown!r}", b"Transfer-Encoding:" + value, body=_CHUNKS)


def _chunk(name: str, chunks: bytes, *, means: bytes | None = None) -> Message:
    return _with(f"chunks: {name}", _CHUNKED, body=chunks, means=means)


CORPUS: tuple[Message, ...] = (
    _with("plain", _LENGTH, means=_BODY),
    _with("chunked", _CHUNKED, body=_CHUNKS, means=_BODY),
    _with("two requests", _LENGTH, body=_BODY + _HIDDEN, means=_BODY, requests=2),
    # Two lengths, or two ways to say it.
    _with("length, then chunked", _LENGTH, _CHUNKED, body=_CHUNKS),
    _with("chunked, then length", _CHUNKED, _LENGTH, body=_CHUNKS),
    _with("length short of chunked", b"Content-Length: 4", _CHUNKED, body=_CHUNKS + _HIDDEN),
    _with("length 0 and chunked", b"Content-Length: 0", _CHUNKED, body=_CHUNKS),
    _with("the same length twice", _LENGTH, _LENGTH, means=_BODY),
    _with("two lengths", _LENGTH, b"Content-Length: 0", body=_BODY + _HIDDEN),
    _with("two lengths, the first 0", b"Content-Length: 0", _LENGTH, body=_HIDDEN),
    _with("list of one length", b"Content-Length: 12, 12", means=_BODY),
    _with("list of lengths", b"Content-Length: 12, 0", body=_BODY + _HIDDEN),
    *(
        _length(value)
        for value in (
            *(b" +12", b" -12", b" 12x", b" 0x0c", b" 1_2", b" 12.0", b" 1 2", b"", b" \x0c12"),
            *(b" 18446744073709551628", b" 4294967308", b" 12;", b' "12"', b" \xd9\xa1\xd9\xa2"),
        )
    ),
    _with("length with zeros before", b"Content-Length: 0012", means=_BODY),
    _with("length with many zeros before", b"Content-Length: %s12" % (b"0" * 30), means=_BODY),
    _with("space before the colon", b"Content-Length : 12", body=_BODY + _HIDDEN),
    _with("tab before the colon", b"Content-Length\t: 12", body=_BODY + _HIDDEN),
    _with("underscore", b"Content_Length: 40", _LENGTH, means=_BODY),
    _with("length in a folded line", b"X: 1", b" Content-Length: 40", _LENGTH),
    _with("folded length", b"Content-Length:", b" 12"),
    _with("NUL in a name", b"Content-Length\x00: 12"),
    _with("NUL in a value", b"X: a\x00b", _LENGTH),
    _with("name in quotes", b'"Content-Length": 40', _LENGTH),
    _with("name of another alphabet", b"C\xd0\xbentent-Length: 40", _LENGTH),
    _with("bare LF between headers", b"X: 1\nContent-Length: 40", _LENGTH),
    _with("bare CR between headers", b"X: 1\rContent-Length: 40", _LENGTH),
    _with("bare CR before a name", b"\rContent-Length: 40", _LENGTH),
    _with("CR CR LF", b"X: 1\r\r\nContent-Length: 40", _LENGTH),
    _with("no colon", b"Content-Length 12", body=_BODY + _HIDDEN),
    _with("empty name", b": 12", _LENGTH),
    # Codings.
    *(
        _coding(value)
        for value in (
            *(
                b" xchunked",
                b" chunkedx",
                b" identity",
                b" identity, chunked",
                b" chunked, identity",
            ),
            *(b" gzip, chunked", b" chunked, chunked", b" chunked;x=1", b' "chunked"', b" chunk"),
            *(b"\x0bchunked", b"\x0cchunked", b" \x00chunked", b"", b" ,chunked", b" chunked,"),
        )
    ),
    _with("chunked in capitals", b"Transfer-Encoding: CHUNKED", body=_CHUNKS, means=_BODY),
    _with("tab before chunked", b"Transfer-Encoding:\tchunked", body=_CHUNKS, means=_BODY),
    _with("chunked twice", _CHUNKED, _CHUNKED, body=_CHUNKS),
    _with("two codings", _CHUNKED, b"Transfer-Encoding: identity", body=_CHUNKS),
    _with("coding, space before colon", b"Transfer-Encoding : chunked", _LENGTH),
    _with("coding, underscore", b"Transfer_Encoding: chunked", _LENGTH, means=_BODY),
    _with("coding in a folded line", b"Transfer-Encoding:", b" chunked", body=_CHUNKS),
    Message(
        "chunked in HTTP/1.0",
        b"POST /generate HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n" + _CHUNKS,
    ),
    # Chunks.
    _chunk("extension", b"c;a=b\r\n%s\r\n0\r\n\r\n" % _BODY, means=_BODY),
    _chunk("extension in quotes", b'c;a="\r\n"\r\n%s\r\n0\r\n\r\n' % _BODY),
    _chunk("LF in an extension", b"c;a\n%s\r\n0\r\n\r\n" % _BODY),
    _chunk("LF after the size", b"c\n%s\r\n0\r\n\r\n" % _BODY),
    _chunk("CR after the size", b"c\r%s\r\n0\r\n\r\n" % _BODY),
    _chunk("LF after the data", b"c\r\n%s\n0\r\n\r\n" % _BODY),
    _chunk("nothing after the data", b"c\r\n%s0\r\n\r\n" % _BODY),
    _chunk("0x", b"0xc\r\n%s\r\n0\r\n\r\n" % _BODY),
    _chunk("sign", b"+c\r\n%s\r\n0\r\n\r\n" % _BODY),
    _chunk("negative", b"-c\r\n%s\r\n0\r\n\r\n" % _BODY),
    _chunk("space before", b" c\r\n%s\r\n0\r\n\r\n" % _BODY),
    _chunk("underscore", b"0_c\r\n%s\r\n0\r\n\r\n" % _BODY),
    _chunk("2^64 and more", b"1000000000000000c\r\n%s\r\n0\r\n\r\n" % _BODY),
    _chunk("2^32 and more", b"10000000c\r\n%s\r\n0\r\n\r\n" % _BODY),
    _chunk("no size", b"\r\n%s\r\n0\r\n\r\n" % _BODY),
    _chunk(
        "trailer that frames", b"c\r\n%s\r\n0\r\nContent-Length: 40\r\n\r\n" % _BODY, means=_BODY
    ),
    _chunk("trailer with a key", b"c\r\n%s\r\n0\r\nAuthorization: x\r\n\r\n" % _BODY, means=_BODY),
    _chunk("bare LF in the trailer", b"c\r\n%s\r\n0\r\nX: 1\n\r\n" % _BODY),
    # What a proxy is asked to take out.
    _with("connection: content-length", b"Connection: content-length", _LENGTH, means=_BODY),
    _with("connection: te", b"Connection: transfer-encoding", _CHUNKED, body=_CHUNKS, means=_BODY),
    _with("connection: host", b"Connection: host", _LENGTH, means=_BODY),
    _with("h2c", b"Connection: Upgrade", b"Upgrade: h2c", _LENGTH, means=_BODY),
    _with("websocket", b"Connection: Upgrade", b"Upgrade: websocket", _LENGTH, means=_BODY),
    _with("expect", b"Expect: 100-continue", _LENGTH, means=_BODY),
    _with("expect something else", b"Expect: 200-ok", _LENGTH, means=_BODY),
    # Where it goes.
    _with("two hosts", b"Host: b", _LENGTH),
    _with("host in a list", b"Host: a, b", _LENGTH),
    Message("no host", b"GET /v1/models HTTP/1.1\r\n\r\n"),
    _line("get", b"GET /v1/models HTTP/1.1", means="/v1/models"),
    _line("get with query", b"GET /v1/models?a=b HTTP/1.1", means="/v1/models?a=b"),
    _line("fragment", b"GET /v1/models#/x HTTP/1.1"),
    _line("absolute form", b"GET http://b/v1/models HTTP/1.1"),
    _line("absolute form of another", b"GET http://a@b:1/v1/models HTTP/1.1"),
    _line("two slashes", b"GET //v1/models HTTP/1.1"),
    _line("dots", b"GET /generate/../v1/models HTTP/1.1"),
    _line("encoded letter", b"GET /%761/models HTTP/1.1"),
    _line("encoded slash", b"GET /v1%2fmodels HTTP/1.1"),
    _line("encoded NUL", b"GET /v1/models%00 HTTP/1.1", means=None),
    _line("backslash", b"GET /v1\\models HTTP/1.1"),
    _line("parameter", b"GET /v1;x/models HTTP/1.1"),
    _line("two spaces", b"GET  /v1/models HTTP/1.1", means="/v1/models"),
    _line("tab", b"GET\t/v1/models\tHTTP/1.1"),
    _line("space in the target", b"GET /v1/models HTTP/1.1 HTTP/1.1"),
    _line("8 bits in the target", b"GET /v1/models\xff HTTP/1.1"),
    _line("small letters", b"get /v1/models HTTP/1.1"),
    _line("version 1.10", b"GET /v1/models HTTP/1.10"),
    _line("version 2.0", b"GET /v1/models HTTP/2.0"),
    _line("version in small letters", b"GET /v1/models http/1.1"),
    _line("no version", b"GET /v1/models"),
    _line("connect", b"CONNECT a:443 HTTP/1.1"),
    _line("trace", b"TRACE /v1/models HTTP/1.1"),
    _line("asterisk", b"OPTIONS * HTTP/1.1"),
    Message(
        "lines before it",
        b"\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
        ("/v1/models", b""),
    ),
    Message(
        "body of a GET",
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s"
        % (len(_HIDDEN), _HIDDEN),
        ("/v1/models", _HIDDEN),
    ),
    Message(
        "LF alone everywhere",
        b"GET /v1/models HTTP/1.1\nHost: a\n\n",
    ),
)

"""Bodies that are answered by the router, since an instance might break at them."""

from __future__ import annotations

import http.client
import json
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.router.http import body_check
from kunserve_sglang.router.http.answers import RequestError
from kunserve_sglang.router.http.body_check import MAX_ANSWERS, MAX_DEPTH, check_body
from tests.support.router_harness import RouterCluster

LARGE = b"1" + b"0" * 400

BAD_BODIES: dict[str, tuple[bytes, str | None]] = {
    "no utf-8": (b'{"prompt": "\xff\xfe", "max_tokens": 3}', None),
    "utf-16": ('{"prompt": "x"}'.encode("utf-16"), None),
    "utf-16 without a mark": ('{"prompt": "x"}'.encode("utf-16-le"), None),
    "half a surrogate": (b'{"prompt": "\\ud800", "max_tokens": 3}', "prompt"),
    "half a surrogate inside": (b'{"messages": [{"content": "a\\uDC00"}]}', "messages"),
    "half a surrogate as a name": (b'{"\\ud800": 1}', "\\ud800"),
    "a number without end": (b'{"prompt": "x", "max_tokens": ' + LARGE + b"}", "max_tokens"),
    "below any number": (b'{"prompt": "x", "max_tokens": -' + LARGE + b"}", "max_tokens"),
    "a long number": (b'{"seed": 9223372036854775808}', "seed"),
    "a number of thousands of digits": (b'{"seed": ' + b"1" * 5000 + b"}", None),
    "a large fraction": (b'{"sampling_params": {"temperature": 1e400}}', "temperature"),
    "a token without end": (b'{"input_ids": [1, ' + LARGE + b"]}", "input_ids"),
    "a token of many": (b'{"input_ids": [[1], [2, ' + LARGE + b"]]}", "input_ids"),
    "mixed": (b'{"prompt": ["a", NaN]}', "prompt"),
    "no number": (b'{"prompt": "x", "max_tokens": NaN}', "max_tokens"),
    "infinity": (b'{"logit_bias": {"5": -Infinity}}', "5"),
    "deep": (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", None),
    "rather deep": (b'{"a":' * MAX_DEPTH + b"[]" + b"}" * MAX_DEPTH, None),
    "twice": (b'{"max_tokens": 1, "prompt": "x", "max_tokens": 2}', "max_tokens"),
    "twice inside": (b'{"sampling_params": {"n": 1, "n": 2}}', "n"),
    "twice in two spellings": (b'{"n": 1, "\\u006e": 2}', "n"),
    "many prompts": (json.dumps({"prompt": ["x"] * (MAX_ANSWERS + 1)}).encode(), "prompt"),
    "many token lists": (
        json.dumps({"input_ids": [[1]] * (MAX_ANSWERS + 1)}).encode(),
        "input_ids",
    ),
    "many answers": (b'{"prompt": "x", "n": 1000000000}', "n"),
    "many answers each": (b'{"text": ["x", "y"], "sampling_params": {"n": 5000}}', "n"),
    "many answers of one": (b'{"text": ["x"], "sampling_params": [{"n": 9000}]}', "n"),
}

GOOD_BODIES: dict[str, bytes] = {
    "another type": b'{"prompt": {"a": 1}, "max_tokens": "many"}',
    "nothing": b"",
    "text": b"prompt",
    "no object": b"[1, 2]",
    "brackets": b"[" * 500,
    "a text of brackets": b'"' + b"{" * 500 + b'"',
    "emoji": b'{"prompt": "\\ud83d\\ude00 \xf0\x9f\x98\x80"}',
    "the largest numbers": b'{"a": 9223372036854775807, "b": -9223372036854775808, "c": 1e308}',
    "a number in a text": b'{"prompt": "NaN Infinity 1e400 ' + LARGE + b'"}',
    "a long prompt": json.dumps({"input_ids": list(range(20_000))}).encode(),
    "nearly deep": b'{"a":' * (MAX_DEPTH - 1) + b"1" + b"}" * (MAX_DEPTH - 1),
    "wide": json.dumps({"messages": [{"content": "x"}] * 500}).encode(),
    "nulls": b'{"prompt": null, "n": null, "sampling_params": null}',
}


FIELDS = ["text", "prompt", "input_ids", "n", "sampling_params", "x"]


def refusal(body: bytes) -> RequestError | None:
    try:
        check_body("/v1/completions", body)
    except RequestError as error:
        return error
    return None


@pytest.mark.parametrize(("body", "field"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_what_breaks_readers_is_refused_by_the_name_of_its_field(
    body: bytes, field: str | None
) -> None:
    error = refusal(body)
    assert error is not None
    assert (error.status, error.code, error.field) == (400, "bad_json", field)


@pytest.mark.parametrize("body", GOOD_BODIES.values(), ids=GOOD_BODIES.keys())
def test_all_else_is_for_the_instance(body: bytes) -> None:
    assert refusal(body) is None


@given(
    st.one_of(
        st.binary(),
        st.text(alphabet='[]{}":,\\ud8n0.1e9-tf', max_size=60).map(str.encode),
        st.recursive(
            st.none() | st.floats() | st.integers() | st.text() | st.sampled_from(["text", "n"]),
            lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(FIELDS), inner),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_nothing_that_can_come_raises_anything_else(body: bytes) -> None:
    error = refusal(body)
    assert error is None or error.status == 400


NAMES = st.sampled_from(["n", "a:b", ":", 'q"', "\\u006e"])
ITEMS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([":", "x:y", '":', "\\n"])


@st.composite
def objects_with_repeated_names(draw: st.DrawFn) -> bytes:
    pairs = draw(st.lists(st.tuples(NAMES, st.recursive(ITEMS, st.lists)), min_size=1, max_size=5))
    colon = draw(st.sampled_from([":", " : ", ":\n"]))
    comma = draw(st.sampled_from([",", ", "]))
    text = comma.join(f"{json.dumps(name)}{colon}{json.dumps(item)}" for name, item in pairs)
    wrapped = draw(st.sampled_from(["{%s}", '{"in":{%s}}', "[{%s}, {}]", '{"in": [1, {%s}]}']))
    return (wrapped % text).replace("\\\\", "\\").encode()


@given(objects_with_repeated_names() | st.sampled_from([*GOOD_BODIES.values()]))
def test_a_glance_says_what_a_closer_look_says(body: bytes) -> None:
    glance = refusal(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body_check, "_plain", lambda _: None)
        closer = refusal(body)
    assert str(glance) == str(closer)


def test_a_glance_is_enough_for_most() -> None:
    usual = [{"text": "a: b", "sampling_params": {"n": 1}}, {"input_ids": [1, 2], "stream": True}]
    for body in usual:
        assert body_check._plain(json.dumps(body).encode()) == body
        assert body_check._plain(json.dumps(body, separators=(",", ":")).encode()) == body


def test_forms_are_not_read() -> None:
    check_body("/v1/audio/transcriptions", b"\xff\xfe" + LARGE)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/classify"])
@pytest.mark.parametrize("bodies", [BAD_BODIES, GOOD_BODIES], ids=["bad", "good"])
def test_whatever_is_in_a_body_has_an_answer(
    idle_router: RouterCluster, path: str, bodies: dict[str, Any]
) -> None:
    """On a connection that goes on."""
    with closing(
        http.client.HTTPConnection("127.0.0.1", idle_router.port, timeout=20)
    ) as connection:
        for name, body in bodies.items():
            text = body if bodies is GOOD_BODIES else body[0]
            connection.request("POST", path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == (200 if bodies is GOOD_BODIES else 400), name
            assert answer.read()

"""The list of routes: what a path is on it, and what the documentation says of it."""

from __future__ import annotations

import re

import pytest

from kunserve_sglang.core.paths import Lookup
from kunserve_sglang.core.routes import SERVER_ROUTES, Handling, ServerRoute, server_routes
from kunserve_sglang.router.proxy.prompts import PromptReader
from kunserve_sglang.router.proxy.proxy import _SAME_EVERYWHERE
from tests.support.places import ROOT

FEATURES = ROOT / "docs" / "features.md"

LOOKUP = Lookup([("/a", 1), ("/a/{x}", 2), ("/a/{x}/end", 3), ("/m/{x:path}", 4)])


@pytest.mark.parametrize(
    ("path", "entry"),
    [
        (b"/a", 1),
        (b"/a/b", 2),
        (b"/a/resp_0-9.~:@+=,A", 2),
        (b"/a/b/end", 3),
        (b"/a/end", 2),
        (b"/m/org/model-7B", 4),
        (b"/m/org%2Fmodel%2fx", 4),
        (b"/m//home/someone/.cache/model", 4),
        (b"/m/...", 4),
    ],
)
def test_a_path_has_one_spelling(path: bytes, entry: int) -> None:
    assert LOOKUP.find(path) == entry


@pytest.mark.parametrize(
    "path",
    [
        b"", b"a", b"/", b"//a", b"/A", b"/a/", b"/a?", b"/a#", b"/%61", b"/a\n", b"/a\x00",
        b"/a/b/", b"/a/b%2Fend", b"/a/.", b"/a/..", b"/a/%2e", b"/a/b;x", b"/a/b c", b"/a/b\n",
        b"/a/../a", b"/a/b/end/", b"/a/b/../end", b"/a/" + b"x" * 513,
        b"/m/", b"/m/a/", b"/m/a//b", b"/m///a", b"/m/a/..", b"/m/../a", b"/m/a%2F..%2Fb",
        b"/m/a%2f..", b"/m/%2e%2e/a", b"/m/%2F%2Fa", b"/m/a%252Fb", b"/m/a\xe9",
        b"/m/" + b"/".join([b"x"] * 50),
    ],
)  # fmt: skip
def test_no_other_spelling_is_found(path: bytes) -> None:
    assert LOOKUP.find(path) is None


def test_routes_move_with_the_environment_of_the_servers() -> None:
    moved = server_routes({"AIP_PREDICT_ROUTE": "/predict"})
    assert "/vertex_generate" not in moved
    assert moved["/predict"].handling is Handling.FORWARD
    assert len(moved) == len(SERVER_ROUTES)


@pytest.mark.parametrize("onto", ["/flush_cache", "/update_weights_from_disk", "/generate"])
def test_a_route_that_is_moved_onto_another_opens_nothing(onto: str) -> None:
    before = server_routes({})[onto].handling
    for variable in ("SGLANG_OLLAMA_CHAT_ROUTE", "AIP_PREDICT_ROUTE"):
        assert server_routes({variable: onto})[onto].handling is before


def test_every_path_is_there_once() -> None:
    paths = [route.path for route in SERVER_ROUTES]
    assert len(set(paths)) == len(paths)


def test_what_the_router_knows_requests_by_is_forwarded() -> None:
    forwarded = {r.path for r in SERVER_ROUTES if r.handling is Handling.FORWARD}
    assert set(PromptReader._READS) | _SAME_EVERYWHERE <= forwarded


SAID = {
    "to one instance": Handling.FORWARD,
    "answered by the router": Handling.ANSWER,
    "to all instances, with the admin key": Handling.TO_ALL,
    "refused": Handling.REFUSE,
    "not served": Handling.HIDE,
}


def documented() -> list[ServerRoute]:
    """The rows of the table under `## Routes`."""
    section = FEATURES.read_text().split("\n## Routes\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!---|what )(.*?) \| (.*) \|$", section, re.MULTILINE)
    found = []
    for what, calls in rows:
        said, _, reason = what.partition(": ")
        for methods, path in re.findall(r"`([A-Z, ]+) (/\S*)`", calls):
            found.append(ServerRoute(path, tuple(methods.split(", ")), SAID[said], reason))
    return found


def test_the_documentation_has_the_same_list() -> None:
    assert documented() == list(SERVER_ROUTES)

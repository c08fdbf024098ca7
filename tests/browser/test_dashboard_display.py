"""The dashboard for everybody: by keyboard, in both schemes, on a phone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Visit
from tests.support.dashboard_page import ask_for, instance
from tests.support.router_harness import RouterCluster
from tests.support.tenants import FILE, A, streams

Start = Callable[..., RouterCluster]
Open = Callable[..., Visit]


def test_the_keyboard_is_enough(start_router: Start, visit: Open) -> None:
    router = start_router(2)
    page = visit(router).page
    drop = page.get_by_role("button", name="Drop parameters…")
    expect(drop).to_be_enabled()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the memory map")).to_be_focused()
    page.keyboard.press("Tab")
    expect(drop).to_be_focused()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    go = dialog.get_by_role("button", name="Drop parameters", exact=True)
    expect(go).to_be_enabled()
    page.keyboard.press("Tab")
    expect(go).to_be_focused()
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("heading", name="Group of instances 0 and 1")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(start_router: Start, visit: Open, scheme: str) -> None:
    """A ratio of 4.5 is what WCAG asks of normal text (level AA)."""
    page = visit(start_router(1), color_scheme=scheme).page
    expect(instance(page, 0)).to_be_visible()
    colours = page.evaluate(
        """() => [...document.querySelectorAll("h1, #policy, .note, .badge, .layers-text")]
            .map((element) => {
              let ground = element;
              const of = (e) => getComputedStyle(e).backgroundColor;
              while (of(ground) === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
              return [getComputedStyle(element).color, of(ground)];
            })"""
    )
    assert len(colours) > 5
    for text, ground in colours:
        assert contrast(text, ground) >= 4.5, (text, ground)
    light_on_dark = luminance(colours[0][0]) > luminance(colours[0][1])
    assert light_on_dark == (scheme == "dark")


def test_tenants_are_shown_with_what_they_have(
    start_router: Start, visit: Open, tmp_path: Path
) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(FILE.format(a="weight = 3\nmax_requests = 2", b=""))
    router = start_router(1, tenants=str(file))
    seen = visit(router, viewport={"width": 320, "height": 640})
    table = seen.page.get_by_role("region", name="Tenants").get_by_role("table")
    of_a = table.get_by_role("row").filter(
        has=seen.page.get_by_role("rowheader", name="a", exact=True)
    )
    expect(of_a.get_by_role("cell")).to_have_text(["3", "0 of 2", "0", "0", "0", "0", "0"])
    with streams(router) as asked:
        asked.run(A, "x", sampling_params={"max_new_tokens": 7})
        expect(of_a.get_by_role("cell").nth(1)).to_have_text("1 of 2")
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 320
    assert seen.complaints == []


def test_without_tenants_nothing_is_said_of_them(start_router: Start, visit: Open) -> None:
    page = visit(start_router(1)).page
    expect(instance(page, 0)).to_be_visible()
    expect(page.get_by_role("heading", name="Tenants")).to_be_hidden()


def test_a_phone_needs_no_sideways_scrolling(start_router: Start, visit: Open) -> None:
    router = start_router(3)
    page = visit(router, viewport={"width": 320, "height": 640}).page
    expect(instance(page, 2)).to_be_visible()
    ask_for(page, "Drop")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 320


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, by WCAG's formula."""
    red, green, blue = (
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(n) / 255 for n in re.findall(r"\d+", colour)[:3])
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)

"""A real browser, and routers with mock instances for it to look at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.support.router_harness import RouterCluster

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

PATIENCE_MS = 20_000
"""For a machine that is busy with other things; what is waited for comes within a second or two."""


def find_chromium() -> str | None:
    """The browser of the system, or the one that KUNSERVE_CHROMIUM names."""
    named = os.environ.get("KUNSERVE_CHROMIUM")
    return named or next((found for name in _NAMES if (found := shutil.which(name))), None)


@dataclass
class Visit:
    """One page, and what has been noticed about it."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)


@pytest.fixture(autouse=True)
def _patience() -> Iterator[None]:
    expect.set_options(timeout=PATIENCE_MS)
    yield
    expect.set_options(timeout=5_000)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        pytest.skip(
            "no Chromium is installed: `apt-get install chromium`, or name one in KUNSERVE_CHROMIUM"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, timeout=3 * PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens the dashboard of a router; the arguments are those of Playwright's `new_context`."""
    contexts = []

    def open_page(router: RouterCluster, **context: Any) -> Visit:
        contexts.append(chromium.new_context(**context))
        contexts[-1].set_default_timeout(PATIENCE_MS)
        found = Visit(contexts[-1].new_page())
        found.page.goto(f"http://127.0.0.1:{router.port}/dashboard")
        return found

    yield open_page
    for context in contexts:
        context.close()

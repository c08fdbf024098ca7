"""Parts of the dashboard's page, as a user finds them."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect


def instance(page: Page, number: int) -> Locator:
    named = page.get_by_role("heading", name=f"Instance {number}", exact=True)
    return page.locator("article").filter(has=named)


def width(bar: Locator, use: str) -> float:
    box = bar.locator(f".{use}").bounding_box()
    assert box is not None
    return box["width"]


def ask_for(page: Page, kind: str) -> Locator:
    """Open the confirmation, and wait for the plan in it."""
    page.get_by_role("button", name=f"{kind} parameters…").click()
    dialog = page.get_by_role("dialog", name=f"{kind} parameters?")
    expect(dialog).to_contain_text("token slots")
    return dialog


def confirm(dialog: Locator, kind: str) -> None:
    dialog.get_by_role("button", name=f"{kind} parameters", exact=True).click()

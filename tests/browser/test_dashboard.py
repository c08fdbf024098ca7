"""The dashboard as people use it: in a browser, with a router and mock instances behind it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
from playwright.sync_api import expect

from kunserve_sglang.core.load import Load, Slots
from kunserve_sglang.testing.mock_member import CAPACITY, LAYERS, PROFILE
from tests.browser.conftest import Visit
from tests.support.dashboard_page import ask_for, confirm, instance, width
from tests.support.mock_instance import vote_no
from tests.support.mock_worker import Canned
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]
Open = Callable[..., Visit]


def test_a_drop_and_a_restore_by_hand(start_router: Start, visit: Open) -> None:
    router = start_router(2)
    seen = visit(router)
    page = seen.page
    expect(page.locator("#connection")).to_have_text("live")
    bar = instance(page, 0).locator(".pages")
    expect(instance(page, 0)).to_contain_text(f"Holds all {LAYERS} layers")
    expect(instance(page, 0)).to_contain_text("parameters 50 %, KV free 50 %")
    assert width(bar, "parameters") == pytest.approx(width(bar, "open"), abs=2)

    dialog = ask_for(page, "Drop")
    expect(dialog).to_contain_text("Instance 0 will hold layers 0 to 1 of 4 in a group of 2")
    expect(dialog).to_contain_text("400 KiB of parameters are freed")
    assert router.event() is None
    confirm(dialog, "Drop")
    expect(dialog).to_be_hidden()

    expect(page.get_by_role("heading", name="Group of instances 0 and 1")).to_be_visible()
    expect(instance(page, 0)).to_contain_text("Holds layers 0 to 1 of 4")
    expect(instance(page, 1)).to_contain_text("Holds layers 2 to 3 of 4")
    expect(instance(page, 1).locator(".layers .held")).to_have_count(2)
    expect(instance(page, 0)).to_contain_text("parameters 25 %, KV free 75 %")
    until(lambda: width(bar, "open") > 2.8 * width(bar, "parameters"))
    event = page.locator("#events > li").first
    expect(event).to_contain_text("drop of instances 0 and 1")
    expect(event).to_contain_text("Reason: asked for")
    expect(event).to_contain_text("committed")
    expect(event).to_contain_text("✓ these instances as one group of 2 (+192 slots): as asked for")

    dialog = ask_for(page, "Restore")
    expect(dialog).to_contain_text("Instance 1 will hold all 4 layers")
    confirm(dialog, "Restore")
    expect(page.get_by_role("heading", name="Full replica")).to_have_count(2)
    expect(page.locator("#events > li")).to_have_count(2)
    assert seen.complaints == []
    assert seen.hosts == {f"127.0.0.1:{router.port}"}


def test_what_the_router_holds_back_is_shown_while_there_is_any(
    start_router: Start, visit: Open
) -> None:
    router = start_router(1, max_in_flight=1)
    connections = [router.open("POST", "/generate", {"stream": True}) for _ in range(3)]
    until(lambda: router.status()["queue"]["requests"] == 2)
    figures = visit(router).page.locator("#figures")
    expect(figures).to_contain_text(re.compile(r"Queued2in the router, the oldest for [\d.]+ m?s"))
    for connection in connections:
        connection.close()
    expect(figures).not_to_contain_text("Queued")
    expect(figures).to_contain_text("Waiting0")


def test_the_numbers_are_those_of_the_router(start_router: Start, visit: Open) -> None:
    router = start_router(2)
    busy = router.instances[1]
    quarter = CAPACITY // 4
    busy.load = Load(
        slots=Slots(used=quarter, cached=quarter, capacity=CAPACITY),
        running=3,
        waiting=2,
        demand=3 * CAPACITY,
    )
    connection = router.open("POST", "/generate", {"stream": True})
    until(lambda: any(i.worker.streams for i in router.instances))
    for mock in router.instances:
        mock.worker.emit(b"data: 1\n\n")
    page = visit(router).page
    figures = page.locator("#figures")
    expect(figures).to_contain_text(re.compile(rf"Demand{3 * CAPACITY}\D*150 % of {2 * CAPACITY}"))
    expect(figures).to_contain_text(re.compile(r"Running3hold.*Waiting2for"))
    expect(figures).to_contain_text(re.compile(r"TTFT[\d.]+ m?sp90 [\d.]+ m?s"))
    expect(figures).to_contain_text("median of 1 stream in 60 s")
    expect(figures).to_contain_text("TPOT\u2013")
    expect(instance(page, 1)).to_contain_text("3 running, 2 waiting")
    expect(instance(page, 1).get_by_role("img", name=f"{PROFILE.pages} pages")).to_have_attribute(
        "aria-label", re.compile(r"KV used 1[23]( |\.).*KV cached 1[23] %")
    )
    chart = page.get_by_role("img", name=f"Demand {3 * CAPACITY} against capacity {2 * CAPACITY}")
    expect(chart).to_be_visible()
    for mock in router.instances:
        mock.worker.emit(b"data: 2\n\n")
        mock.worker.finish()
    expect(figures).to_contain_text(re.compile(r"TPOT[\d.]+ m?sp90 [\d.]+ m?s"))
    connection.close()


def test_who_opens_it_late_sees_what_was_before(start_router: Start, visit: Open) -> None:
    router = start_router(1)

    def demands() -> list[int]:
        return [s["demand"] for s in router.get("/kunserve/history").json["samples"]]

    until(lambda: 0 in demands())
    router.instances[0].set_load(demand=2 * CAPACITY)
    until(lambda: demands()[-1] == 2 * CAPACITY)
    page = visit(router).page
    # At once more than the one point that the page has seen itself, and not all as high.
    curve = page.locator("#history .demand")
    expect(curve).to_have_attribute("d", re.compile(r"^M0\.0 120\.0L"))
    expect(page.locator("#span")).to_contain_text(f"up to {2 * CAPACITY} slots now")


def test_it_shows_who_gets_what_was_promised(start_router: Start, visit: Open) -> None:
    router = start_router(1, slo_ttft_ms=3_600_000, slo_tpot_ms=3_600_000, slo_class=("fast=5:5",))
    page = visit(router).page
    figures = page.locator("#figures")
    expect(figures).to_contain_text("Within limits\u2013of 0 requests in 60 s")
    worker = router.instances[0].worker
    worker.answers["/generate"] = Canned({"meta_info": {"completion_tokens": 3}})
    assert router.post("/generate", {}).status == 200
    expect(figures).to_contain_text("Within limits100 %of 1 request in 60 s")
    worker.answers["/generate"] = Canned("", 503)
    assert router.post("/generate", {}, **{"X-KunServe-Class": "fast"}).status == 503
    expect(figures).to_contain_text("Within limits50 %of 2 requests in 60 s")
    expect(figures).to_contain_text("default 100 % · fast 0 %")
    expect(page.get_by_role("img", name="Requests within their limits: 50 %")).to_be_visible()


def test_an_aborted_drop_says_why(start_router: Start, visit: Open) -> None:
    router = start_router(2)
    router.instances[1].on_prepare = partial(vote_no, reason="<b>not now</b>")
    page = visit(router).page
    dialog = ask_for(page, "Drop")
    confirm(dialog, "Drop")
    expect(dialog.get_by_role("alert")).to_contain_text(
        "The drop was aborted: instance 1 refused: <b>not now</b>"
    )
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.locator("#events > li")).to_contain_text("aborted")
    expect(page.locator("#events > li")).to_contain_text("<b>not now</b>")


def test_what_cannot_be_done_is_said_before(start_router: Start, visit: Open) -> None:
    router = start_router(2)
    page = visit(router).page
    page.get_by_role("button", name="Restore parameters…").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("alert")).to_have_text("all parameters are in place already")
    expect(dialog.get_by_role("button", name="Restore parameters")).to_be_disabled()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("button", name="Restore parameters…")).to_be_focused()


def test_the_admin_key_is_asked_for_and_not_kept(start_router: Start, visit: Open) -> None:
    router = start_router(2, admin_api_key="secret")
    page = visit(router).page
    dialog = ask_for(page, "Drop")
    key = dialog.get_by_label("Admin key")
    expect(key).to_be_hidden()
    confirm(dialog, "Drop")
    expect(dialog.get_by_role("alert")).to_have_text("The admin key is needed.")
    expect(key).to_be_focused()
    key.fill("wrong")
    key.press("Enter")
    expect(dialog.get_by_role("alert")).to_have_text("The router does not accept this key.")
    assert router.event() is None
    key.fill("secret")
    key.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("heading", name="Group of instances 0 and 1")).to_be_visible()

    confirm(ask_for(page, "Restore"), "Restore")
    expect(page.get_by_role("heading", name="Full replica")).to_have_count(2)
    kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
    assert kept == [0, 0, ""]
    page.reload()
    confirm(ask_for(page, "Drop"), "Drop")
    expect(page.get_by_label("Admin key")).to_be_visible()


def test_the_read_key_is_asked_for_and_changes_nothing(start_router: Start, visit: Open) -> None:
    router = start_router(2, admin_api_key="secret", read_api_key="look")
    page = visit(router).page
    expect(page.locator("#connection")).to_have_text("key needed")
    key = page.get_by_label("Key to look at this cluster")
    expect(key).to_be_focused()
    key.fill("wrong")
    key.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The router does not accept this key.")
    key.fill("look")
    page.get_by_role("button", name="Show the cluster").click()
    expect(page.locator("#connection")).to_have_text("live")
    expect(key).to_be_hidden()
    expect(instance(page, 0)).to_contain_text(f"Holds all {LAYERS} layers")

    dialog = ask_for(page, "Drop")
    confirm(dialog, "Drop")
    expect(dialog.get_by_role("alert")).to_have_text("The admin key is needed.")
    assert router.event() is None
    dialog.get_by_label("Admin key").fill("secret")
    dialog.get_by_label("Admin key").press("Enter")
    expect(dialog).to_be_hidden()
    assert router.event()["status"] == "committed"


def test_the_admin_key_opens_everything_at_once(start_router: Start, visit: Open) -> None:
    router = start_router(2, admin_api_key="secret", read_api_key="look")
    page = visit(router).page
    key = page.get_by_label("Key to look at this cluster")
    key.fill("secret")
    key.press("Enter")
    confirm(ask_for(page, "Drop"), "Drop")
    expect(page.get_by_role("heading", name="Group of instances 0 and 1")).to_be_visible()


def test_a_router_that_stops_and_comes_back(start_router: Start, visit: Open) -> None:
    router = start_router(1)
    seen = visit(router)
    page = seen.page
    notice = page.locator("#unreachable")
    expect(instance(page, 0)).to_be_visible()
    expect(notice).to_be_hidden()
    assert seen.complaints == []
    router.stop_router()
    expect(notice).to_contain_text("The router cannot be reached")
    expect(page.locator("#connection")).to_have_text("unreachable")
    expect(page.get_by_role("button", name="Drop parameters…")).to_be_disabled()
    expect(instance(page, 0)).to_be_visible()
    router.start_router()
    expect(notice).to_be_hidden()
    expect(page.locator("#connection")).to_have_text("live")
    # The browser itself reports connections that fail; the page has nothing to add.
    assert all("net::ERR" in complaint for complaint in seen.complaints)


def test_asking_slows_down_when_nobody_looks_or_answers(start_router: Start, visit: Open) -> None:
    seen = visit(start_router(0, expect=2))
    pauses = seen.page.evaluate(
        """async () => {
            const { Poller } = await import("/dashboard/poll.js");
            const poller = new Poller(null, {});
            const after = (failures) => Object.assign(poller, { failures }).pause();
            const visible = [0, 1, 2, 3, 30].map(after);
            Object.defineProperty(document, "hidden", { configurable: true, value: true });
            return [visible, [0, 1, 30].map(after)];
        }"""
    )
    assert pauses == [[1_000, 2_000, 4_000, 8_000, 15_000], [15_000] * 3]


def test_who_comes_back_to_the_page_need_not_wait(start_router: Start, visit: Open) -> None:
    page = visit(start_router(1)).page
    expect(page.locator("#connection")).to_have_text("live")
    status = re.compile("/kunserve/status$")
    with page.expect_response(status):
        page.evaluate("Object.defineProperty(document, 'hidden', { value: true, writable: true })")
    # From here on the page asks every 15 s only.
    with page.expect_response(status, timeout=7_000):
        page.evaluate("document.hidden = false")
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def test_a_lost_instance_is_shown_and_not_counted(start_router: Start, visit: Open) -> None:
    router = start_router(2)
    page = visit(router).page
    figures = page.locator("#figures")
    expect(figures).to_contain_text(f"of {2 * CAPACITY} slots")
    router.instances[0].reporting = False
    router.instances[0].worker.stop()
    for _ in range(2):
        router.post("/v1/completions", {"prompt": "x"})
    expect(instance(page, 0)).to_contain_text("Lost: connection refused")
    expect(instance(page, 0).locator(".badge")).to_have_text("dead")
    expect(figures).to_contain_text(f"of {CAPACITY} slots")
    router.instances[0].worker.start()

"""The timelines of the live page: stalls, targets, pausing, zooming, what the pointer is told."""

from __future__ import annotations

import re

import pytest
from live_page import (
    COUNT_PIXELS,
    PACE_S,
    Slow,
    load,
    opened,
    part,
    slow_server,
    wait_for_pixels,
)
from playwright.sync_api import Browser, Page, expect
from server_fixtures import RunningServer

STALL_S = 0.15  # with which the rule "over 100 ms" finds a stall
TARGET_S = 5.0


def picture(page: Page) -> str:
    content: str = page.evaluate("document.getElementById('requests').toDataURL()")
    return content


def test_a_stall_is_red_and_counted(browser: Browser, page_server: RunningServer) -> None:
    slow = page_server.engine.engine.executor
    assert isinstance(slow, Slow)
    with opened(browser, page_server.url) as page, load(page_server, 2):
        page.locator("#span").select_option("10")
        page.locator("#over").select_option("10")
        wait_for_pixels(page, "requests", "--decode", 200)
        expect(part(page, "stalls")).to_have_text("0")
        assert page.evaluate(COUNT_PIXELS, ["requests", "--stall"]) == 0
        slow.seconds = STALL_S
        try:
            page.locator("#rule").select_option("0.1")
            wait_for_pixels(page, "requests", "--stall", 100)
            expect(part(page, "stalls")).not_to_have_text("0")
            expect(page.locator("#sentence")).to_contain_text(
                re.compile(r"\d+ stalls? in the last")
            )
        finally:
            slow.seconds = PACE_S
        page.locator("#rule").select_option("target")
        expect(part(page, "stalls")).to_have_text("0")


def test_targets_are_shown_with_their_percentiles(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("slo")
    with (
        slow_server(folder, tbt_slo_s=TARGET_S, ttft_slo_s=TARGET_S) as running,
        opened(browser, running.url) as page,
        load(running, 1),
    ):
        expect(page.locator("#about")).to_contain_text("target 5.00 s")
        expect(part(page, "tbt-target")).to_have_text("target 5.00 s")
        expect(part(page, "ttft-target")).to_have_text("target 5.00 s")
        expect(part(page, "tbt-share")).to_have_text("100 % in time")
        expect(part(page, "tbt-mark")).to_be_visible()
        wait_for_pixels(page, "iterations", "--predicted", 50)
        wait_for_pixels(page, "iterations", "--target", 50)


def test_it_pauses_and_goes_on(browser: Browser, page_server: RunningServer) -> None:
    with opened(browser, page_server.url) as page, load(page_server, 1):
        wait_for_pixels(page, "requests", "--decode", 100)
        page.keyboard.press("Space")
        expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#paused")).to_contain_text("paused")
        page.wait_for_timeout(300)
        before = picture(page)
        page.wait_for_timeout(700)
        assert picture(page) == before
        page.locator("#pause").click()
        expect(page.locator("#paused")).to_be_hidden()
        page.wait_for_timeout(700)
        assert picture(page) != before


def test_what_is_under_pointer_and_cursor_is_told(
    browser: Browser, page_server: RunningServer
) -> None:
    with opened(browser, page_server.url) as page, load(page_server, 1):
        page.locator("#span").select_option("5")
        wait_for_pixels(page, "iterations", "--decode", 1000)
        page.locator("#iterations").hover(position={"x": 1300, "y": 60})
        expect(page.locator("#tip")).to_contain_text(re.compile("iteration of .*1 decode,"))
        page.locator("#requests").hover(position={"x": 1300, "y": 16})
        expect(page.locator("#tip")).to_contain_text("token after")
        page.mouse.move(5, 5)
        expect(page.locator("#tip")).to_be_hidden()
        page.keyboard.press("Space")
        page.locator("#requests").focus()
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#tip")).to_contain_text("default")
        expect(page.locator("#spoken")).to_contain_text("s ago")
        page.locator("#iterations").focus()
        page.keyboard.press("End")
        expect(page.locator("#tip")).to_contain_text("iteration of")
        left = page.locator("#tip").evaluate("(tip) => tip.style.left")
        page.keyboard.press("Shift+ArrowLeft")
        expect(page.locator("#tip")).not_to_have_css("left", left)
        page.keyboard.press("Escape")
        expect(page.locator("#tip")).to_be_hidden()


def test_the_keyboard_zooms(browser: Browser, page_server: RunningServer) -> None:
    with opened(browser, page_server.url) as page:
        expect(page.locator("#connection")).to_have_text("live")
        page.keyboard.press("-")
        expect(page.locator("#span")).to_have_value("60")
        page.keyboard.press("=")
        page.keyboard.press("=")
        expect(page.locator("#span")).to_have_value("10")
        page.locator("#zoom-out").click()
        expect(page.locator("#span")).to_have_value("30")

"""The playground of the live page: chats, a long prompt thrown in, errors."""

from __future__ import annotations

import re

from live_page import (
    CONTEXT,
    opened,
    part,
    wait_for_pixels,
)
from playwright.sync_api import Browser, expect
from server_fixtures import RunningServer


def test_two_chats_go_on_while_a_long_prompt_is_read(
    browser: Browser, page_server: RunningServer
) -> None:
    with opened(browser, page_server.url) as page:
        expect(page.locator("#connection")).to_have_text("live")
        page.locator("#most-tokens").select_option("512")
        lanes = page.locator("form.lane")
        first, second, long = (lanes.nth(place) for place in range(3))
        page.locator("#both").click()
        for lane in (first, second):
            expect(lane.locator(".assistant")).to_have_text(re.compile("."))
            expect(lane.get_by_role("button", name="Send")).to_be_disabled()
        expect(long.locator("option", has_text="12,000")).to_be_disabled()
        long.locator("[data-lane=length]").select_option("1500")
        long.get_by_role("button", name="Throw in a long prompt").click()
        expect(long.locator(".user")).to_have_text("a prompt of about 1,500 tokens")
        wait_for_pixels(page, "requests", "--prefill", 50)
        expect(long.locator(".status")).to_contain_text("first after")
        for lane in (first, second, long):
            lane.get_by_role("button", name="Stop").click()
            expect(lane.locator(".status")).to_contain_text(
                re.compile(r"stopped · \d+ tokens?, first")
            )
            expect(lane.get_by_role("button", name="Stop")).to_be_disabled()
        expect(part(page, "running")).to_have_text("0")


def test_an_error_is_shown_in_its_lane(browser: Browser, page_server: RunningServer) -> None:
    with opened(browser, page_server.url) as page:
        expect(page.locator("#connection")).to_have_text("live")
        lane = page.get_by_role("form", name="Second chat")
        lane.locator("textarea").fill("é " * CONTEXT)
        lane.get_by_role("button", name="Send").click()
        expect(lane.locator(".status")).to_contain_text("the context is")
        expect(lane.locator(".status")).to_have_class(re.compile("bad"))
        expect(lane.get_by_role("button", name="Send")).to_be_enabled()

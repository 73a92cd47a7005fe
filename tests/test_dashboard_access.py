"""Who can use the live page: keyboards, screen readers, phones, dark rooms."""

from __future__ import annotations

from typing import Any

import pytest
from live_page import (
    Size,
    load,
    opened,
    wait_for_pixels,
)
from playwright.sync_api import Browser, expect
from server_fixtures import RunningServer

PHONE: Size = (360, 740)

# What a screen reader would have no name for, and text that is too faint on its ground.
FIND_NAMELESS = """
() => [...document.querySelectorAll("button, select, textarea, input, canvas, a, summary, [role]")]
  .filter((each) => each.getAttribute("aria-hidden") !== "true")
  .filter((each) => {
    const own = /^(INPUT|SELECT|TEXTAREA)$/.test(each.tagName) ? "" : each.textContent;
    const labels = [...(each.labels ?? [])]
      .flatMap((label) => [...label.childNodes])
      .map((node) => (node === each ? "" : node.textContent))
      .join("");
    const by = document.getElementById(each.getAttribute("aria-labelledby"))?.textContent;
    const names = [each.getAttribute("aria-label"), by, labels, own];
    const may = ["status", "tooltip", "alert"].includes(each.getAttribute("role"));
    return !may && !names.some((name) => name && name.trim());
  })
  .map((each) => each.outerHTML.slice(0, 80))
"""
CONTRASTS = """
() => {
  const style = getComputedStyle(document.documentElement);
  const light = (name) => {
    const hex = style.getPropertyValue(name).trim().slice(1);
    const parts = [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255);
    const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const found = {};
  for (const name of ["text", "soft", "stall", "target", "decode", "prefill", "predicted"]) {
    found[name] = Math.min(
      ...["--panel", "--page"].map((ground) => contrast(light(`--${name}`), light(ground))),
    );
  }
  return found;
}
"""


def test_the_theme_follows_the_system_until_it_is_chosen(
    browser: Browser, page_server: RunningServer
) -> None:
    with opened(browser, page_server.url, color_scheme="dark", reduced_motion="reduce") as page:
        root = page.locator("html")
        expect(root).to_have_attribute("data-theme", "dark")
        expect(page.locator("#theme")).to_have_attribute("aria-pressed", "true")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.locator("#theme").click()
        expect(root).to_have_attribute("data-theme", "light")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        page.reload()
        expect(root).to_have_attribute("data-theme", "light")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_marks_stand_out(browser: Browser, page_server: RunningServer, theme: Any) -> None:
    with opened(browser, page_server.url, color_scheme=theme) as page:
        contrasts = page.evaluate(CONTRASTS)
    for name in ("text", "soft", "stall", "target", "decode"):
        assert contrasts[name] >= 4.5, name  # WCAG 2.2, 1.4.3
    for name in ("prefill", "predicted"):
        assert contrasts[name] >= 3, name  # 1.4.11


def test_everything_has_a_name_and_is_reached_in_order(
    browser: Browser, page_server: RunningServer
) -> None:
    with opened(browser, page_server.url) as page:
        expect(page.locator("#connection")).to_have_text("live")
        assert page.evaluate(FIND_NAMELESS) == []
        order = []
        for _ in range(14):
            page.keyboard.press("Tab")
            order.append(
                page.evaluate("document.activeElement.id || document.activeElement.tagName")
            )
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", order[-1]
        controls = ["pause", "zoom-in", "span", "zoom-out", "over", "rule", "theme"]
        assert order[:9] == ["A", *controls, "requests"]
        assert "iterations" in order
        headings = page.locator("h1, h2").all_inner_texts()
        assert headings[0] == "stallfree"
        assert {"Requests", "Iterations", "Playground"} <= set(headings)


def test_it_is_usable_on_a_phone(browser: Browser, page_server: RunningServer) -> None:
    with (
        opened(browser, page_server.url, PHONE, has_touch=True, is_mobile=True) as page,
        load(page_server, 2),
    ):
        wait_for_pixels(page, "requests", "--decode", 50)
        page.locator("#table summary").click()
        expect(page.locator("#table tbody tr")).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        page.locator("#pause").tap()
        expect(page.locator("#paused")).to_be_visible()
        page.locator("#iterations").tap(position={"x": 300, "y": 40})
        small = page.evaluate(
            "[...document.querySelectorAll('button, select')].filter((e) => e.offsetParent &&"
            " e.getBoundingClientRect().height < 24).map((e) => e.id)"
        )
        assert small == []  # WCAG 2.2, 2.5.8

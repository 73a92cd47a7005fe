"""The live page in headless Chromium, watching a tiny model behind real HTTP."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from browser import Slow, find_chromium
from server_fixtures import MODEL, RunningServer, serve, tiny_engine

pytest.importorskip("playwright")

from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    Route,
    expect,
    sync_playwright,
)

expect.set_options(timeout=10_000)

KEY = "a-very-secret-key"
CONTEXT = 8192
PACE_S = 0.02  # of an iteration
STALL_S = 0.15  # with which the rule "over 100 ms" finds a stall
TARGET_S = 5.0

Size = tuple[int, int]
DESK: Size = (1440, 900)
PHONE: Size = (360, 740)

# How many pixels of a canvas have nearly the color of a variable of the theme, or that of a band.
COUNT_PIXELS = """
([id, name]) => {
  const canvas = document.getElementById(id);
  const copy = document.createElement("canvas");
  copy.width = canvas.width;
  copy.height = canvas.height;
  const probe = copy.getContext("2d", { willReadFrequently: true });
  const style = getComputedStyle(document.documentElement);
  const wanted = [1, 0.6].map((alpha) => {
    probe.fillStyle = style.getPropertyValue("--panel").trim();
    probe.fillRect(0, 0, 1, 1);
    probe.globalAlpha = alpha;
    probe.fillStyle = style.getPropertyValue(name).trim();
    probe.fillRect(0, 0, 1, 1);
    probe.globalAlpha = 1;
    return probe.getImageData(0, 0, 1, 1).data;
  });
  probe.drawImage(canvas, 0, 0);
  const data = probe.getImageData(0, 0, canvas.width, canvas.height).data;
  let count = 0;
  for (let i = 0; i < data.length; i += 4) {
    const isNear = ([r, g, b]) =>
      Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 60;
    if (wanted.some(isNear)) count += 1;
  }
  return count;
}
"""

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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_chromium()
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    engine = tiny_engine(tmp_path_factory.mktemp("page"), CONTEXT, dtype="float32")
    engine.executor = Slow(engine, PACE_S)
    engine.end_token_ids = frozenset()  # no answer ends by chance
    with serve(engine) as running:
        yield running


@contextmanager
def opened(browser: Browser, url: str, size: Size = DESK, **context: Any) -> Iterator[Page]:
    """The live page, on which nothing may go wrong that its console would tell of."""
    width, height = size
    with browser.new_context(viewport={"width": width, "height": height}, **context) as own:
        page = own.new_page()
        page.set_default_timeout(10_000)
        troubles: list[str] = []

        def note(message: ConsoleMessage) -> None:
            if message.type != "log":
                troubles.append(message.text)

        page.on("console", note)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(f"{url}/dashboard")
        yield page
        expected = r"status of 4(00|01)|net::ERR_FAILED"  # what a test provokes
        assert [each for each in troubles if not re.search(expected, each)] == []


@contextmanager
def load(server: RunningServer, num_requests: int, **fields: Any) -> Iterator[None]:
    """So many streams run on the server meanwhile."""
    ends = threading.Event()
    begun = threading.Barrier(num_requests + 1, timeout=10)

    def stream() -> None:
        body = {
            "model": MODEL,
            "prompt": "alpha beta gamma",
            "max_tokens": 1500,
            "ignore_eos": True,
            "stream": True,
            **fields,
        }
        with (
            httpx.Client(trust_env=False, timeout=30) as client,
            client.stream("POST", f"{server.url}/v1/completions", json=body) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            begun.wait()
            while not ends.is_set():
                next(lines)

    threads = [threading.Thread(target=stream) for _ in range(num_requests)]
    for thread in threads:
        thread.start()
    begun.wait()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join()


def part(page: Page, name: str) -> Locator:
    return page.locator(f"[data-part='{name}']")


def wait_for_pixels(page: Page, canvas: str, color: str, least: int) -> None:
    for _ in range(100):
        if page.evaluate(COUNT_PIXELS, [canvas, color]) >= least:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{canvas} never had {least} pixels of {color}")


def picture(page: Page) -> str:
    content: str = page.evaluate("document.getElementById('requests').toDataURL()")
    return content


def test_a_newcomer_is_told_what_to_do_and_sees_it_happen(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = tiny_engine(tmp_path_factory.mktemp("fresh"), dtype="float32")
    engine.executor = Slow(engine, PACE_S)
    with serve(engine) as fresh, opened(browser, fresh.url) as page:
        expect(page.locator("#connection")).to_have_text("live")
        expect(page.locator("#about")).to_contain_text(f"{MODEL} · sarathi")
        expect(page.locator("#empty")).to_be_visible()
        expect(page.locator("#curl")).to_contain_text(f"curl -N {fresh.url}/v1/completions")
        expect(page.locator("#curl")).to_contain_text(MODEL)
        with load(fresh, 2):
            expect(page.locator("#empty")).to_be_hidden()
            expect(part(page, "running")).to_have_text("2")
            wait_for_pixels(page, "requests", "--decode", 200)
            wait_for_pixels(page, "iterations", "--decode", 200)
            expect(part(page, "tbt-p99")).to_contain_text(re.compile(r"\d+ ms"))
            expect(part(page, "ttft-p50")).to_contain_text(re.compile(r"\d+ ms"))
            expect(page.locator("#sentence")).to_contain_text("2 requests running, 0 waiting")
            expect(page.locator("#sentence")).to_contain_text("No stalls")
            page.locator("#table summary").click()
            expect(page.locator("#table tbody tr")).to_have_count(2)
            expect(page.locator("#table tbody tr").first).to_contain_text("answering")
        expect(part(page, "running")).to_have_text("0")


def test_a_stall_is_red_and_counted(browser: Browser, server: RunningServer) -> None:
    slow = server.engine.engine.executor
    assert isinstance(slow, Slow)
    with opened(browser, server.url) as page, load(server, 2):
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
    engine = tiny_engine(
        tmp_path_factory.mktemp("slo"), dtype="float32", tbt_slo_s=TARGET_S, ttft_slo_s=TARGET_S
    )
    engine.executor = Slow(engine, PACE_S)
    with serve(engine) as running, opened(browser, running.url) as page, load(running, 1):
        expect(page.locator("#about")).to_contain_text("target 5.00 s")
        expect(part(page, "tbt-target")).to_have_text("target 5.00 s")
        expect(part(page, "ttft-target")).to_have_text("target 5.00 s")
        expect(part(page, "tbt-share")).to_have_text("100 % in time")
        expect(part(page, "tbt-mark")).to_be_visible()
        wait_for_pixels(page, "iterations", "--predicted", 50)
        wait_for_pixels(page, "iterations", "--target", 50)


def test_it_pauses_and_goes_on(browser: Browser, server: RunningServer) -> None:
    with opened(browser, server.url) as page, load(server, 1):
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


def test_what_is_under_pointer_and_cursor_is_told(browser: Browser, server: RunningServer) -> None:
    with opened(browser, server.url) as page, load(server, 1):
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


def test_the_keyboard_zooms(browser: Browser, server: RunningServer) -> None:
    with opened(browser, server.url) as page:
        expect(page.locator("#connection")).to_have_text("live")
        page.keyboard.press("-")
        expect(page.locator("#span")).to_have_value("60")
        page.keyboard.press("=")
        page.keyboard.press("=")
        expect(page.locator("#span")).to_have_value("10")
        page.locator("#zoom-out").click()
        expect(page.locator("#span")).to_have_value("30")


def test_the_key_is_asked_for_and_kept_in_the_tab(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = tiny_engine(tmp_path_factory.mktemp("locked"), dtype="float32")
    with serve(engine, api_key=KEY) as locked, opened(browser, locked.url) as page:
        dialog = page.locator("#ask")
        expect(dialog).to_be_visible()
        expect(page.locator("#ask-wrong")).to_be_hidden()
        page.locator("#ask-key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#ask-wrong")).to_be_visible()
        page.locator("#ask-key").fill(KEY)
        page.get_by_role("button", name="Continue").click()
        expect(dialog).to_be_hidden()
        expect(page.locator("#connection")).to_have_text("live")
        page.reload()
        expect(page.locator("#connection")).to_have_text("live")
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + location.href")
        lane = page.get_by_role("form", name="First chat")
        lane.get_by_role("button", name="Send").click()
        expect(lane.locator(".status")).to_contain_text("token")
        page.locator("#forget").click()
        expect(dialog).to_be_visible()


def test_two_chats_go_on_while_a_long_prompt_is_read(
    browser: Browser, server: RunningServer
) -> None:
    with opened(browser, server.url) as page:
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


def test_an_error_is_shown_in_its_lane(browser: Browser, server: RunningServer) -> None:
    with opened(browser, server.url) as page:
        expect(page.locator("#connection")).to_have_text("live")
        lane = page.get_by_role("form", name="Second chat")
        lane.locator("textarea").fill("é " * CONTEXT)
        lane.get_by_role("button", name="Send").click()
        expect(lane.locator(".status")).to_contain_text("the context is")
        expect(lane.locator(".status")).to_have_class(re.compile("bad"))
        expect(lane.get_by_role("button", name="Send")).to_be_enabled()


def test_a_lost_connection_is_told_and_comes_back(browser: Browser, server: RunningServer) -> None:
    def lose(route: Route) -> None:
        route.abort()

    with opened(browser, server.url) as page:
        expect(page.locator("#connection")).to_have_text("live")
        page.route("**/dashboard/feed", lose)
        page.evaluate("document.getElementById('forget').click()")  # connects anew
        expect(page.locator("#connection")).to_contain_text("connection lost")
        expect(page.locator("#again")).to_be_visible()
        page.unroute("**/dashboard/feed")
        expect(page.locator("#connection")).to_have_text("live")
        expect(page.locator("#again")).to_be_hidden()


def test_the_theme_follows_the_system_until_it_is_chosen(
    browser: Browser, server: RunningServer
) -> None:
    with opened(browser, server.url, color_scheme="dark", reduced_motion="reduce") as page:
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
def test_text_and_marks_stand_out(browser: Browser, server: RunningServer, theme: Any) -> None:
    with opened(browser, server.url, color_scheme=theme) as page:
        contrasts = page.evaluate(CONTRASTS)
    for name in ("text", "soft", "stall", "target", "decode"):
        assert contrasts[name] >= 4.5, name  # WCAG 2.2, 1.4.3
    for name in ("prefill", "predicted"):
        assert contrasts[name] >= 3, name  # 1.4.11


def test_everything_has_a_name_and_is_reached_in_order(
    browser: Browser, server: RunningServer
) -> None:
    with opened(browser, server.url) as page:
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


def test_it_is_usable_on_a_phone(browser: Browser, server: RunningServer) -> None:
    with (
        opened(browser, server.url, PHONE, has_touch=True, is_mobile=True) as page,
        load(server, 2),
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


def test_the_page_keeps_only_so_much(browser: Browser, server: RunningServer) -> None:
    program = """
    async () => {
      const { Store } = await import("/dashboard/store.js");
      const store = new Store();
      store.take({ type: "snapshot", next: 0, now: 0, requests: [], tiers: {} });
      const facts = (request, tier, tbt_s) => ({
        kind: "added", request, id: `chatcmpl-${request}-0/0`, tier, at: 0, prompt: 4,
        most_outputs: 9, tbt_s, ttft_s: null,
      });
      const records = [facts(1, "default", 0.5), facts(2, "flex", null), facts(3, "default", null)];
      let at = 0;
      const iterate = (decodes, took) => {
        records.push({
          kind: "iteration", start: at, end: at + took, predicted: null, budget: 8, failed: false,
          decodes, prefills: [], running: 3, waiting: [0, 0, 0], free_blocks: 1,
        });
        at += took;
      };
      for (let n = 0; n < 20000; n++) iterate([1, 2, 3], 0.01);
      iterate([1, 2, 3], 0.75); // over the target of the first; flex has none
      iterate([1, 2, 3], 1.5); // over a second, too, which is long without any target
      for (let request = 4; request < 200; request++) {
        records.push(facts(request, "default", null));
        records.push({ kind: "ended", request, at, reason: "stop", outputs: 0 });
      }
      store.take({ type: "records", first: 0, lost: 0, now: at, records });
      const summary = store.gaps.summary(at - 3, at, (target) => store.limit(target));
      const row = store.rows.get(1);
      return {
        iterations: store.iterations.slots.length, ended: store.ended.length,
        tokens: row.tokens.values.length, kept: row.tokens.length, outputs: row.outputs,
        over: summary.over, limited: summary.limited, all: summary.count, worst: summary.worst,
      };
    }
    """
    with opened(browser, server.url) as page:
        found = page.evaluate(program)
    assert found["iterations"] == 6000
    assert found["ended"] == 48
    assert found["tokens"] == 8192
    assert 4096 <= found["kept"] <= 8192
    assert found["outputs"] == 20_002
    assert found["over"] == 3
    assert found["limited"] == pytest.approx(found["all"] * 2 / 3, abs=1)
    assert found["worst"] == pytest.approx(1.5)

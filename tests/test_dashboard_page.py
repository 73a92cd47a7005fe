"""The live page: its first view, its key, its connection, and how much it keeps."""

from __future__ import annotations

import re

import pytest
from live_page import (
    load,
    opened,
    part,
    slow_server,
    wait_for_pixels,
)
from playwright.sync_api import Browser, Route, expect
from server_fixtures import MODEL, RunningServer, serve, tiny_engine

KEY = "a-very-secret-key"


def test_a_newcomer_is_told_what_to_do_and_sees_it_happen(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fresh")
    with slow_server(folder) as fresh, opened(browser, fresh.url) as page:
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


def test_a_lost_connection_is_told_and_comes_back(
    browser: Browser, page_server: RunningServer
) -> None:
    def lose(route: Route) -> None:
        route.abort()

    with opened(browser, page_server.url) as page:
        expect(page.locator("#connection")).to_have_text("live")
        page.route("**/dashboard/feed", lose)
        page.evaluate("document.getElementById('forget').click()")  # connects anew
        expect(page.locator("#connection")).to_contain_text("connection lost")
        expect(page.locator("#again")).to_be_visible()
        page.unroute("**/dashboard/feed")
        expect(page.locator("#connection")).to_have_text("live")
        expect(page.locator("#again")).to_be_hidden()


def test_the_page_keeps_only_so_much(browser: Browser, page_server: RunningServer) -> None:
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
    with opened(browser, page_server.url) as page:
        found = page.evaluate(program)
    assert found["iterations"] == 6000
    assert found["ended"] == 48
    assert found["tokens"] == 8192
    assert 4096 <= found["kept"] <= 8192
    assert found["outputs"] == 20_002
    assert found["over"] == 3
    assert found["limited"] == pytest.approx(found["all"] * 2 / 3, abs=1)
    assert found["worst"] == pytest.approx(1.5)

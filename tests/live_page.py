"""The live page in headless Chromium: opening it, putting load on its server, counting pixels."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fixtures import MODEL, RunningServer, serve, tiny_engine

pytest.importorskip("playwright")

from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    expect,
    sync_playwright,
)

from stallfree.core.batch import Batch
from stallfree.engine.engine import Engine
from stallfree.executor.output import ExecutorOutput

expect.set_options(timeout=10_000)

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CONTEXT = 8192
PACE_S = 0.02  # of an iteration

Size = tuple[int, int]
DESK: Size = (1440, 900)

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


def find_chromium() -> str:
    """Path of a Chromium; skips the test if there is none."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium here: none of {', '.join(NAMES)} is a command")
    return path


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; skips the test if this machine has none."""
    path = find_chromium()
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        own = playwright.chromium.launch(executable_path=path, args=flags)
        yield own
        own.close()


class Slow:
    """A real executor whose iterations take `seconds` longer."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self.seconds = seconds
        self._executor = engine.executor

    def execute(self, batch: Batch) -> ExecutorOutput:
        """Run `batch` after a while."""
        time.sleep(self.seconds)
        return self._executor.execute(batch)


@contextmanager
def slow_server(folder: Path, **settings: Any) -> Iterator[RunningServer]:
    """A server of a tiny model in `folder` with `PACE_S` for an iteration."""
    engine = tiny_engine(folder, CONTEXT, dtype="float32", **settings)
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
        expected = r"status of (400|401|503)|net::ERR_FAILED"  # what a test provokes
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

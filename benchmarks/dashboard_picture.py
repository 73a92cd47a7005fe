"""A picture of the live page: the demo model under a mixed load, seen by headless Chromium.

    python benchmarks/dashboard_picture.py                        # docs/dashboard.png
    python benchmarks/dashboard_picture.py --theme dark --width 360 --output phone.png

Five clients of three tiers stream answers, a long prompt comes every few seconds, and the page's
own chats talk while another is thrown in. Needs Chromium, and playwright (extra `test`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import threading
import time
import urllib.request
from pathlib import Path

from load import Target, make_prompt, send
from playwright.sync_api import Page, sync_playwright
from server import ServerError, serving

from stallfree.core.targets import RANKS

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CLIENTS = 5
LONG_WORDS, LONG_EVERY_S = 900, 9.0
SLO = "250ms"
START_S, WATCH_S = 6.0, 22.0  # before the chats start, and from then to the picture
FULL_PAGE_HEIGHT = 900


class MixedLoad:
    """Clients that send one request after another, in threads, until told to end.

    Args:
        target: the server.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._ends = threading.Event()
        for place in range(CLIENTS):
            threading.Thread(target=self._stream, args=(place,), daemon=True).start()
        threading.Thread(target=self._throw, daemon=True).start()

    def end(self) -> None:
        """Send nothing more; what runs ends with the server."""
        self._ends.set()

    def _stream(self, place: int) -> None:
        draw = random.Random(place)
        tier = tuple(RANKS)[place % len(RANKS)]
        time.sleep(place * 0.7)
        while not self._ends.is_set():
            prompt = make_prompt(draw.randint(20, 160), place)
            self._send(prompt, draw.randint(60, 220), tier)
            self._ends.wait(draw.uniform(0.2, 2))

    def _throw(self) -> None:
        for number in itertools.count():
            if self._ends.wait(LONG_EVERY_S):
                return
            self._send(make_prompt(LONG_WORDS, 1000 + number), 24, "default")

    def _send(self, prompt: str, max_tokens: int, tier: str) -> None:
        send(self._target, prompt, max_tokens, time.perf_counter(), extra={"service_tier": tier})


def take(page: Page, url: str, output: Path) -> None:
    """Let the page's own chats talk, throw in a long prompt, and take the picture."""
    page.goto(f"{url}/dashboard")
    page.wait_for_timeout(START_S * 1000)
    page.locator("#both").click()
    page.wait_for_timeout(WATCH_S * 600)
    page.locator("#long-lane button[type=submit]").click()
    page.wait_for_timeout(WATCH_S * 400)
    page.screenshot(path=output, full_page=True)


def main() -> None:
    """Serve, load, look."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--width", type=int, default=1440)
    parser.add_argument("--scale", type=float, default=1.5)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "dashboard.png")
    options = parser.parse_args()
    if options.url:
        _picture(options, options.url)
        return
    try:
        with serving(["--tbt-slo", SLO]) as url:
            _picture(options, url)
    except ServerError as error:
        raise SystemExit(str(error)) from None


def _picture(options: argparse.Namespace, url: str) -> None:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        raise SystemExit(f"no Chromium here: none of {', '.join(BROWSERS)} is a command")
    with urllib.request.urlopen(f"{url}/v1/models") as response:
        model = json.load(response)["data"][0]["id"]
    load = MixedLoad(Target(url, model))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": options.width, "height": FULL_PAGE_HEIGHT},
            device_scale_factor=options.scale,
            color_scheme=options.theme,
        )
        take(page, url, options.output)
        browser.close()
    load.end()
    print(options.output)


if __name__ == "__main__":
    main()

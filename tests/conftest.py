"""What all tests share: a cache folder of their own, away from the user's; and the live page."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from server_fixtures import RunningServer

_CACHE = pytest.StashKey[TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is collected: compiled kernels go there when they are imported.

    Processes that run tests beside each other share one, and their threads sleep while they wait:
    libgomp's would spin on the processors that the others need.

    Shells ignore Ctrl-C for what they start in the background; the tests press it all the same.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    else:
        config.stash[_CACHE] = folder = TemporaryDirectory(prefix="stallfree-tests-")
        os.environ["STALLFREE_CACHE"] = folder.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: a process that begins one last would end long after others.

    Processes take whole files, in this order.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CACHE in config.stash:
        config.stash[_CACHE].cleanup()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium; skips the test if this machine has none."""
    from live_page import chromium  # not above: not every machine has Playwright

    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def page_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server slow enough for its live page to be watched."""
    from live_page import slow_server

    with slow_server(tmp_path_factory.mktemp("page")) as running:
        yield running

"""Headless Chromium for tests, if this machine has one, and a server slow enough to be watched."""

from __future__ import annotations

import shutil
import time

import pytest

from stallfree.core.batch import Batch
from stallfree.engine.engine import Engine
from stallfree.executor.output import ExecutorOutput

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str:
    """Path of a Chromium; skips the test if there is none."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium here: none of {', '.join(NAMES)} is a command")
    return path


class Slow:
    """A real executor whose iterations take `seconds` longer."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self.seconds = seconds
        self._executor = engine.executor

    def execute(self, batch: Batch) -> ExecutorOutput:
        """Run `batch` after a while."""
        time.sleep(self.seconds)
        return self._executor.execute(batch)

"""What all tests share: a cache folder of their own, away from the user's."""

from __future__ import annotations

import os
import signal
from tempfile import TemporaryDirectory

import pytest

_CACHE = pytest.StashKey[TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is collected: compiled kernels go there when they are imported.

    Shells ignore Ctrl-C for what they start in the background; the tests press it all the same.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = TemporaryDirectory(prefix="stallfree-tests-")
    config.stash[_CACHE] = folder
    os.environ["STALLFREE_CACHE"] = folder.name


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_CACHE].cleanup()

"""What all tests share: a cache folder of their own, away from the user's."""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory

import pytest

_CACHE = pytest.StashKey[TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is collected: compiled kernels go there when they are imported."""
    folder = TemporaryDirectory(prefix="stallfree-tests-")
    config.stash[_CACHE] = folder
    os.environ["STALLFREE_CACHE"] = folder.name


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_CACHE].cleanup()

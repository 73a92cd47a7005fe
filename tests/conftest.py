"""What all tests share: a cache folder of their own, away from the user's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    with (
        TemporaryDirectory(prefix="stallfree-tests-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("STALLFREE_CACHE", str(Path(folder)))
        yield

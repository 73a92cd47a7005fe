"""Compiling kernels, interrupted: whatever is left of it, the next start computes the same."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_fixtures import note

SCRIPT = """
import sys
import numpy as np
from stallfree.kernels.jit import entry
def made(number):
    @entry
    def kernel(values):
        total = 0.0
        for i in range(values.size):
            total += values[i] ** number
        return total
    kernel(np.ones(3))
    hits = sum(kernel.stats.cache_hits.values())
    return hits, kernel(np.arange(4.0))
print("compiling", flush=True)
done = [made(number) for number in range(1, 6)]
print(*(total for _, total in done))
print(*(hits for hits, _ in done))
"""
# One kernel of them, by a process that takes long over each look at what is kept.
SLOW = """
import time
from numba.core.caching import IndexDataCacheFile
look = IndexDataCacheFile._load_index
def slowly(self):
    found = look(self)
    time.sleep(2)
    return found
IndexDataCacheFile._load_index = slowly
""" + SCRIPT.replace("range(1, 6)", "[int(sys.argv[1])]")
EXPECTED = "6.0 14.0 36.0 98.0 276.0"
KILLS = 8
SEED = 5


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "kernels.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def start(script: Path, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    """A process that compiles, and has begun to."""
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "STALLFREE_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "compiling\n"
    return process


def hits(script: Path, cache: Path, warning: str | None = None) -> int:
    """Run it to its end, with the right results; how many kernels were not compiled."""
    out, error = start(script, cache).communicate(timeout=120)
    results, found = out.splitlines()
    assert results == EXPECTED
    if warning is None:
        assert error == ""
    else:
        assert warning in error
        assert "Traceback" not in error
    return sum(map(int, found.split()))


def kept(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*.nb[ic]") if path.is_file())


def test_compiling_is_killed_at_any_moment(script: Path, cache: Path) -> None:
    """At first as soon as there is a file, then after ever more time."""
    started = time.monotonic()
    assert hits(script, cache.with_name("whole")) == 0
    seconds = time.monotonic() - started
    draws = random.Random(SEED)
    for kill in range(KILLS):
        process = start(script, cache)
        if kill % 2:
            time.sleep(draws.uniform(0, seconds / 2))
        else:
            before = set(cache.rglob("*"))
            while process.poll() is None and set(cache.rglob("*")) == before:
                pass
        process.kill()
        process.communicate()
    hits(script, cache)
    assert hits(script, cache) == 5
    note(
        f"SIGKILL at {KILLS} moments of compiling kernels",
        seen="no server yet",
        healthy="the next start",
    )


def test_two_processes_compile_at_once(script: Path, cache: Path) -> None:
    """Each adds another kernel of the same name, and neither takes the other's place."""
    slow = script.with_name("slow.py")
    slow.write_text(SLOW)
    both = [start(slow, cache, number) for number in "23"]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [each.split()[0] for each in said] == ["14.0", "36.0"]
    assert len(kept(cache)) == 3  # an index and two kernels


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_what_is_kept_is_cut_short(script: Path, cache: Path, kind: str, share: float) -> None:
    """As a loss of power may leave it."""
    assert hits(script, cache) == 0
    files = [path for path in kept(cache) if path.suffix == f".{kind}"]
    assert files
    for path in files:
        os.truncate(path, int(path.stat().st_size * share))
    assert hits(script, cache, warning="is damaged; it is made anew") == 0
    assert hits(script, cache) == 5

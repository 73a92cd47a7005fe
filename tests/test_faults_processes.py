"""A process that is ended, gently or not: the port is free, the caches whole, nobody is left."""

from __future__ import annotations

import glob
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fault_fixtures import Stream, model_in, note, seconds_until, server, start, stop

from stallfree.cache import cache_folder
from stallfree.model.int8 import is_supported

INT8 = ("--dtype", "int8", "--threads", "1", "--tbt-slo", "200ms", "--max-model-len", "256")
KILLS = 6
SEED = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("processes"))


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that are there."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended, though nobody may have asked how it ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_server_under_load_is_ended_and_starts_again(model: Path, how: signal.Signals) -> None:
    with server(model, "--drain-timeout", "0.5") as own:
        expected, port = own.text(max_tokens=20), own.port
        streams = [Stream(own, f"river {i}", max_tokens=3000) for i in range(8)]
        for stream in streams:
            stream.wait_for_events()
        chat = {"model": own.model, "messages": [{"role": "user", "content": "hi"}]}
        assert own.http.post("/v1/chat/completions", json={**chat, "max_tokens": 1}).is_success
        children = children_of(own.process.pid)
        code = stop(own, how)
        started = time.monotonic()
        assert code == (0 if how is signal.SIGTERM else -signal.SIGKILL)
        for stream in streams:
            stream.end()
            ended_by_server = bool(stream.events) and "error" in stream.events[-1]
            assert ended_by_server if how is signal.SIGTERM else stream.error is not None
        seconds_until(lambda: not any(runs(pid) for pid in children), 10.0)
    with server(model, port=port) as again:
        healthy_s = time.monotonic() - started
        assert again.port == port
        assert again.text(max_tokens=20) == expected
    if how is signal.SIGTERM:
        seen, lost = "an error event once the drain timeout had passed", "nothing"
    else:
        seen, lost = "a broken connection", "what was running"
    note(f"{how.name} under load", seen=seen, healthy=healthy_s, lost=lost)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder that holds nothing but compiled kernels, which take long to make."""
    own = tmp_path / "cache"
    compiled = cache_folder() / "kernels"
    if compiled.is_dir():
        shutil.copytree(compiled, own / "kernels")
    return own


def forget(cache: Path) -> None:
    """Make the next start a first one, compiled kernels aside."""
    for name in ("int8", "profiles"):
        shutil.rmtree(cache / name, ignore_errors=True)


def wait_for_a_half_written_file(process: subprocess.Popen[bytes], *patterns: str) -> None:
    """Until a file that is being written is there, or the server answers."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(glob.glob(pattern, include_hidden=True) for pattern in patterns):
            return
        time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not is_supported(), reason="this processor cannot run int8 models")
def test_a_first_start_is_killed_at_any_moment(model: Path, cache: Path, tmp_path: Path) -> None:
    """It rounds weights and measures a profile, and is killed before, while and after it does."""
    environment, log = {"STALLFREE_CACHE": str(cache)}, tmp_path / "log.txt"
    started = time.monotonic()
    with server(model, environment=environment, engine=INT8) as own:
        seconds = time.monotonic() - started
        expected = own.text(max_tokens=20)
    draws = random.Random(SEED)
    for kill in range(KILLS):
        forget(cache)
        process = start(model, log=log, environment=environment, engine=INT8)
        if kill == 0:
            wait_for_a_half_written_file(process, f"{cache}/int8/*/.*")
        elif kill == 1:
            wait_for_a_half_written_file(process, f"{cache}/profiles/.*", f"{cache}/profiles/*")
        else:
            time.sleep(draws.uniform(0.3, 1.0) * seconds)
        process.kill()
        process.wait()
    with server(model, environment=environment, engine=INT8) as own:
        assert own.text(max_tokens=20) == expected
        assert "damaged" not in own.log
        assert "made anew" not in own.log
    with server(model, environment=environment, engine=INT8) as own:
        assert own.text(max_tokens=20) == expected
    note(
        f"SIGKILL at {KILLS} moments of a first start",
        seen="no server yet",
        healthy="the next start",
    )

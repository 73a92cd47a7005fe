"""A swap space in a file whose disk fills or fails: KV is not copied any more, no text changes.

What clients send together needs more KV than the cache holds, so that some are always preempted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_fixtures import (
    Server,
    Stream,
    fill,
    model_in,
    note,
    server,
    small_disk,
    start,
    stop,
    workers,
)

MEMORY = Path("/dev/shm")  # a disk that is fast, so that swapping is worth it
ENGINE = (
    *("--dtype", "float32", "--threads", "1", "--token-budget", "64"),
    *("--kv-cache-memory", "96KiB", "--preemption-mode", "swap", "--swap-space", "1MiB"),
)
STAGES = ("--pipeline-parallel-size", "2")
MOST_ROUNDS = 30
SEEN = "nothing: what is preempted is computed again from then on"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("swap"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB."""
    with small_disk(tmp_path / "disk") as folder:
        yield folder


PROMPTS = [[*range(9, 44), number] for number in range(60, 66)]


def alone(own: Server) -> list[str]:
    """What is said to each prompt while there is no other."""
    return [own.text(prompt, max_tokens=60) for prompt in PROMPTS]


def until(own: Server, expected: list[str], condition: Callable[[], bool]) -> None:
    """Send all prompts together, again and again; their answers must be as expected."""
    for _ in range(MOST_ROUNDS):
        streams = [Stream(own, prompt, max_tokens=60) for prompt in PROMPTS]
        assert [each.text for each in streams] == expected
        if condition():
            return
    raise AssertionError(f"it never came true; its log:\n{own.log}")


def num_copied(own: Server, direction: str) -> float:
    """Blocks that were copied `out` or `in` so far."""
    text = own.http.get("/metrics").text
    found = re.search(rf'swapped_blocks_total{{.*direction="{direction}".*}} ([\d.]+)', text)
    assert found, text
    return float(found[1])


def check_nothing_is_swapped(own: Server, expected: list[str]) -> None:
    copied = num_copied(own, "out"), num_copied(own, "in")
    until(own, expected, lambda: True)
    assert (num_copied(own, "out"), num_copied(own, "in")) == copied
    assert own.log.count("KV is not copied any more: ") == 1


@pytest.mark.skipif(not MEMORY.is_dir(), reason="there is no disk in memory")
@pytest.mark.parametrize(
    ("fault", "direction"),
    [
        ("the disk of the swap space fails to write", "out"),
        ("the disk of the swap space fails to read", "in"),
    ],
)
def test_the_disk_of_the_swap_space_fails(model: Path, fault: str, direction: str) -> None:
    with server(model, "--swap-dir", str(MEMORY), engine=ENGINE) as own:
        expected = alone(own)
        until(own, expected, lambda: num_copied(own, "in") > 0)
        before = own.left()
        own.fault(f"swap {direction}")
        until(own, expected, lambda: "KV is not copied any more" in own.log)
        assert own.is_healthy()
        own.fault(None)
        check_nothing_is_swapped(own, expected)
        assert "the swap space cannot be used: [Errno 5] Input/output error" in own.log
        own.check_nothing_left(before)
        assert stop(own) == 0
        assert "Traceback" not in own.log
    note(fault, seen=SEEN, healthy=0.0)


@pytest.mark.parametrize("stages", [(), STAGES])
def test_the_disk_of_the_swap_space_fills(model: Path, disk: Path, stages: tuple[str, ...]) -> None:
    with server(model, "--swap-dir", str(disk), *stages, engine=ENGINE) as own:
        expected = alone(own)
        fill(disk)
        until(own, expected, lambda: num_copied(own, "in") > 0)
        before = own.left()
        assert "KV is not copied any more" not in own.log
        for file in swap_files(own, disk):
            os.truncate(file, 0)
        fill(disk)
        until(own, expected, lambda: "KV is not copied any more" in own.log)
        assert own.is_healthy()
        check_nothing_is_swapped(own, expected)
        assert "the swap space cannot be used: [Errno 28] No space left on device" in own.log
        own.check_nothing_left(before)
        assert stop(own) == 0
    if not stages:
        seen = "nothing: all of its room is taken at the start"
        note("the disk of the swap space fills", seen=seen, healthy=0.0)
        note("the swap space loses its room on a full disk", seen=SEEN, healthy=0.0)


def swap_files(own: Server, disk: Path) -> list[Path]:
    """The files without a name that its processes have open there."""
    files = [
        file
        for pid in (own.process.pid, *workers(own))
        for file in Path(f"/proc/{pid}/fd").iterdir()
        if os.readlink(file).startswith(str(disk))
    ]
    assert files
    return files


def test_no_room_for_a_swap_space_at_the_start(model: Path, disk: Path, tmp_path: Path) -> None:
    fill(disk)
    log = tmp_path / "log.txt"
    process = start(model, "--swap-dir", str(disk), log=log, engine=ENGINE)
    assert process.wait(60) == 2
    assert re.search(r"a swap space of \d+ bytes cannot be made in", log.read_text())
    assert "No space left on device" in log.read_text()
    assert "Traceback" not in log.read_text()
    seen = "no server: exit code 2, and what cannot be made"
    note("--swap-dir is on a full disk at the start", seen=seen, healthy="a restart")

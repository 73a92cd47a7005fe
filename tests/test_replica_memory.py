"""Copies of a model on one machine: what all of them ask for together must fit."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from engine_fixtures import GREEDY, tiny_settings
from replica_fixtures import ThreadFleet, ask, make_front, running, tokens

from stallfree.engine.build import build_engine
from stallfree.engine.memory import ALONE, Neighbours, free_bytes
from stallfree.engine.settings import EngineSettings
from stallfree.engine.swapping import swap_bytes
from stallfree.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    """Preempted requests are kept; nothing says how much of them."""
    own = tiny_settings(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)
    return replace(own, preemption_mode="swap", block_size=128)


def most_of_memory() -> int:
    """More than half of what is free: for one copy it is there, for two it is not."""
    return int(0.7 * free_bytes(CPU))


def test_the_swap_spaces_of_copies_must_fit_together(settings: EngineSettings) -> None:
    size = most_of_memory()
    greedy = replace(settings, swap_space_bytes=size)
    alone = build_engine(greedy, show_progress=False)
    assert alone.scheduler.swap is not None
    with pytest.raises(ConfigError) as caught:
        make_front(ThreadFleet(greedy, count=2))
    found = re.fullmatch(
        rf"swap_space is {size} bytes in each of 2 copies of the model on this machine, but (\d+) "
        r"are free beside the KV cache: lower it to at most (\d+), or name a folder in swap_dir",
        str(caught.value),
    )
    assert found, caught.value
    free, limit = map(int, found.groups())
    assert limit == free // 2 < size < free


def test_what_comes_in_place_of_a_lost_copy_counts_its_own_alone(settings: EngineSettings) -> None:
    """What the others have taken is no longer free."""
    fleet = ThreadFleet(replace(settings, swap_space_bytes=1 << 20), count=2)

    async def main() -> None:
        async with running(fleet) as front:
            fleet.settings = replace(settings, swap_space_bytes=most_of_memory())
            await asyncio.to_thread(fleet.replicas[0].end)
            await asyncio.to_thread(fleet.add)
            while front.health["ready_replicas"] != 2:
                await asyncio.sleep(0.01)
            assert len(tokens(await ask(front, "one", [1], GREEDY))) == 12

    asyncio.run(main())


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_swap_space_that_nobody_asked_for_is_divided(
    settings: EngineSettings, count: int
) -> None:
    free = free_bytes(CPU)
    kv_bytes = int(0.6 * free) // count
    alone = swap_bytes(settings, kv_bytes, CPU, ALONE)
    each = swap_bytes(settings, kv_bytes, CPU, Neighbours(count, count))
    later = swap_bytes(settings, kv_bytes, CPU, Neighbours(count, 1))
    assert 0 < each < later <= alone <= kv_bytes
    assert count * (kv_bytes + each) < free


def test_caches_of_a_device_of_its_own_take_no_host_memory(settings: EngineSettings) -> None:
    kv_bytes = 2 * free_bytes(CPU)
    two = Neighbours(2, 2)
    each = swap_bytes(settings, kv_bytes, torch.device("cuda"), two)
    assert 0 < 2 * each < 0.6 * free_bytes(CPU)
    with pytest.raises(ConfigError, match="but 0 are free beside the KV cache"):
        swap_bytes(replace(settings, swap_space_bytes=each), kv_bytes, CPU, ALONE)


def test_the_caches_of_copies_must_fit_together(settings: EngineSettings) -> None:
    size = most_of_memory()
    greedy = replace(settings, kv_cache_memory_bytes=size, max_num_seqs=1 << 40)
    said = rf"kv_cache_memory is {size} bytes in each of 2 copies .*, but \d+ are free on cpu"
    with pytest.raises(ConfigError, match=said):
        build_engine(greedy, show_progress=False, neighbours=Neighbours(2, 2))


@pytest.mark.timeout(600)
def test_a_server_says_what_its_copies_lack(settings: EngineSettings) -> None:
    pytest.importorskip("ray.serve")
    command = [sys.executable, "-m", "stallfree.cli", "serve", str(settings.model), "--port", "0"]
    command += ["--replicas", "2", "--threads", "1", "--dtype", "float32"]
    command += ["--kv-cache-memory", "1MiB", "--preemption-mode", "swap"]
    done = subprocess.run(
        [*command, "--swap-space", str(most_of_memory())],
        env={**os.environ, "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "in each of 2 copies of the model on this machine" in done.stderr

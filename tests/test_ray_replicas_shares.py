"""Replicas on Ray Serve whose layers are shared by two processes each."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import pytest
from engine_fixtures import GREEDY, PROMPTS, tiny_settings

from stallfree import LLM

pytest.importorskip("ray.serve")
from test_ray_replicas import (
    Clients,
    are_gone,
    health,
    processes_of,
    replicas_of,
    server,
    wait_until,
    workers_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Ray's own
    pytest.mark.timeout(600),
]


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, str]:
    """What one process answers."""
    llm = LLM.from_settings(tiny_settings(tmp_path))
    answers = llm.generate(PROMPTS, replace(GREEDY, max_tokens=40))
    return {prompt: answer.outputs[0].text for prompt, answer in zip(PROMPTS, answers, strict=True)}


@contextmanager
def asked(url: str, expected: dict[str, str]) -> Iterator[Clients]:
    """Clients that are answered until the end of the block, and then were told nothing wrong."""
    clients = Clients(url, expected)
    get_on(clients)
    yield clients
    get_on(clients)
    clients.end()
    assert clients.wrong == []


def get_on(clients: Clients) -> None:
    """Wait for some answers."""
    right = clients.num_right
    wait_until(lambda: clients.num_right > right + 8, lambda: str(clients.errors[:3]))


def has_two_workers(replica: int) -> bool:
    return len(workers_of(replica)) == 2


def is_whole(url: str) -> bool:
    return bool(health(url)["ready_replicas"] == 2)


def test_a_replica_goes_with_each_of_its_processes_and_is_replaced(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    sizes = ("--tensor-parallel-size", "2", "--worker-timeout", "5s")
    with server(tmp_path, *sizes) as (process, url):
        before = replicas_of(process)
        assert [len(workers_of(each)) for each in before] == [2, 2]
        with asked(url, expected) as clients:
            metrics = httpx.get(f"{url}/metrics").text
            for place in (0, 1):
                labels = f'{{kind="busy",replica="{place}",stage="0"}}'
                assert f"stallfree_stage_seconds_total{labels}" in metrics
            for replica, share, how in ((0, 1, signal.SIGKILL), (1, 0, signal.SIGSTOP)):
                victims = workers_of(before[replica])
                os.kill(sorted(victims)[share], how)
                wait_until(partial(are_gone, {**victims, before[replica]: ""}))
                get_on(clients)  # the other goes on
                wait_until(lambda: is_whole(url))
        assert all("was lost" in error for _, _, error in clients.errors), clients.errors
        assert all(streams for streams, _, _ in clients.errors)  # others were run again
        everything = processes_of(process)
        assert sum("stallfree.executor.worker" in title for title in everything.values()) == 4
        assert not set(before) & set(replicas_of(process))
        process.terminate()
        assert process.wait(60) == 0
        wait_until(lambda: are_gone(everything))


def test_a_replica_that_starts_its_processes_anew_loses_no_answer(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    with server(tmp_path, "--tensor-parallel-size", "2", "--restart-workers") as (process, url):
        before = replicas_of(process)
        with asked(url, expected) as clients:
            for replica, share in ((0, 1), (1, 0)):
                victims = workers_of(before[replica])
                os.kill(sorted(victims)[share], signal.SIGKILL)
                wait_until(partial(are_gone, victims))
                wait_until(partial(has_two_workers, before[replica]))
                get_on(clients)
        assert clients.errors == []
        assert replicas_of(process) == before
        everything = processes_of(process)
        own = {pid: title for pid, title in everything.items() if "Agent" not in title}
        assert sum("stallfree.executor.worker" in title for title in own.values()) == 4
        process.kill()
        wait_until(lambda: are_gone(own))

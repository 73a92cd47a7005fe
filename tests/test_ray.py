"""Ray: processes of a model that a cluster starts, and replicas on Ray Serve.

All in one file, and each cluster has ended before the next is started: Ray finds any cluster on a
machine by its processes, and takes it for the one that is meant.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_fixtures import GREEDY, PROMPTS, tiny_settings
from tiny import save_tiny_model

from stallfree import LLM
from stallfree.engine.settings import EngineSettings
from stallfree.errors import ConfigError

ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
    pytest.mark.timeout(600),
]

LONG = replace(GREEDY, max_tokens=40)
START_S = 240.0


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    own = tiny_settings(tmp_path)
    return replace(own, distributed_executor="ray", restart_workers=True)


def test_without_a_cluster_it_says_how_to_start_one(settings: EngineSettings) -> None:
    with pytest.raises(ConfigError, match="no cluster runs here: `ray start --head`"):
        LLM.from_settings(settings)


@contextmanager
def server(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server with two replicas of a tiny model, and its URL."""
    save_tiny_model(folder, "qwen2", initializer_range=0.2)
    command = [sys.executable, "-m", "stallfree.cli", "serve", str(folder), "--port", "0"]
    command += ["--dtype", "float32", "--kv-cache-memory", "4MiB", "--token-budget", "16"]
    command += ["--replicas", "2", "--threads", "1", "--served-model-name", "tiny"]
    command += arguments
    output = folder / "server.txt"
    with output.open("w") as file:
        environment = {**os.environ, "RAY_ADDRESS": "local"}  # whatever else runs here
        process = subprocess.Popen(command, stderr=file, env=environment)
    try:
        wait_until(
            lambda: "http://" in output.read_text() or process.poll() is not None, output.read_text
        )
        found = re.search(r"http://[\d.]+:\d+", output.read_text())
        assert found, output.read_text()
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool], said: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.05)


def processes_of(process: subprocess.Popen[bytes]) -> dict[int, str]:
    """All that descend from a process, with their titles."""
    parents: dict[int, tuple[int, str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            title = folder.joinpath("cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        parents[int(folder.name)] = parent, title
    found = {process.pid: ""}
    grows = True
    while grows:
        more = {pid: title for pid, (parent, title) in parents.items() if parent in found}
        grows = not more.keys() <= found.keys()
        found |= more
    del found[process.pid]
    return found


def replicas_of(process: subprocess.Popen[bytes]) -> list[int]:
    own = processes_of(process)
    return sorted(pid for pid, title in own.items() if title.startswith("ray::ServeReplica"))


def are_gone(pids: dict[int, str]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


class Clients:
    """Ask the same, at once and again and again, until they are told to end."""

    def __init__(self, url: str, expected: dict[str, str]) -> None:
        self.num_right = 0
        self.errors: list[tuple[bool, int, str]] = []
        self.wrong: list[str] = []
        self._url, self._expected = url, expected
        self._has_ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(prompt, streams), daemon=True)
            for prompt in expected
            for streams in (False, True)
        ]
        for each in self._threads:
            each.start()

    def end(self) -> None:
        self._has_ended.set()
        for each in self._threads:
            each.join(60)
            assert not each.is_alive()

    def _ask(self, prompt: str, streams: bool) -> None:
        while not self._has_ended.is_set():
            status, text, error = ask(self._url, prompt, streams)
            if error is not None:
                self.errors.append((streams, status, error))
                time.sleep(0.2)
            elif text != self._expected[prompt]:
                self.wrong.append(text)
            else:
                self.num_right += 1


def ask(url: str, prompt: str, streams: bool = False) -> tuple[int, str, str | None]:
    """Status, text and error of an answer."""
    body: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 40}
    body |= {"temperature": 0, "ignore_eos": True, "stream": streams}
    texts, error = [], None
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        if not streams or answer.status_code != 200:
            answer.read()
            given = answer.json()
            if "error" in given:
                return answer.status_code, "", given["error"]["message"]
            return 200, given["choices"][0]["text"], None
        for line in answer.iter_lines():
            if line and line != "data: [DONE]":
                given = json.loads(line.removeprefix("data: "))
                error = given["error"]["message"] if "error" in given else error
                texts += [each["text"] for each in given.get("choices", ())]
    return answer.status_code, "".join(texts), error


def health(url: str) -> dict[str, Any]:
    return dict(httpx.get(f"{url}/health").json())


def test_a_replica_that_dies_is_replaced_and_nothing_is_left_in_the_end(tmp_path: Path) -> None:
    llm = LLM.from_settings(tiny_settings(tmp_path))
    answers = llm.generate(PROMPTS, LONG)
    expected = {
        prompt: answer.outputs[0].text for prompt, answer in zip(PROMPTS, answers, strict=True)
    }
    with server(tmp_path) as (process, url):
        assert health(url)["ready_replicas"] == 2
        before = replicas_of(process)
        assert len(before) == 2
        clients = Clients(url, expected)
        wait_until(lambda: clients.num_right > 8, lambda: str(clients.errors[:3]))
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: health(url)["ready_replicas"] == 1)
        right = clients.num_right
        wait_until(lambda: clients.num_right > right + 4)  # the other goes on
        wait_until(lambda: health(url)["ready_replicas"] == 2)
        os.kill(before[1], signal.SIGSTOP)  # the one that goes on is now the new one
        wait_until(lambda: health(url)["ready_replicas"] == 1)
        right = clients.num_right
        wait_until(lambda: clients.num_right > right + 4)
        clients.end()
        assert clients.wrong == []
        assert all("was lost" in error for streams, _, error in clients.errors), clients.errors
        assert all(streams for streams, _, _ in clients.errors)  # others were run again
        everything = processes_of(process)
        assert len(everything) > 3
        process.terminate()
        assert process.wait(60) == 0
        wait_until(lambda: are_gone(everything))


def test_nothing_is_left_of_a_server_that_is_killed(tmp_path: Path) -> None:
    with server(tmp_path) as (process, url):
        assert ask(url, "alpha")[2] is None
        everything = processes_of(process)
        own = {pid: title for pid, title in everything.items() if "Agent" not in title}
        assert len(own) > 3
        process.kill()
        wait_until(lambda: are_gone(own))  # two agents of Ray's notice it after a minute


def workers_of(replica: int) -> dict[int, str]:
    """The processes of a replica's model."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            title = folder.joinpath("cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if parent == replica and "stallfree.executor.worker" in title:
            found[int(folder.name)] = title
    return found


def test_replicas_of_several_processes_go_with_all_of_them(tmp_path: Path) -> None:
    llm = LLM.from_settings(tiny_settings(tmp_path))
    expected = llm.generate(["alpha"], LONG)[0].outputs[0].text
    with server(tmp_path, "--pipeline-parallel-size", "2") as (process, url):
        before = replicas_of(process)
        assert [len(workers_of(each)) for each in before] == [2, 2]
        for _ in range(4):
            assert ask(url, "alpha") == (200, expected, None)
        metrics = httpx.get(f"{url}/metrics").text
        for place in (0, 1):
            labels = f'{{kind="busy",replica="{place}",stage="1"}}'
            assert f"stallfree_stage_seconds_total{labels}" in metrics
        trace = httpx.post(f"{url}/debug/trace?seconds=1", timeout=60).json()["traceEvents"]
        names = {each["args"]["name"] for each in trace if each["name"] == "process_name"}
        assert {"replica 0: iterations", "replica 1: iterations"} <= names
        victims = workers_of(before[0])
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: are_gone(victims))
        wait_until(lambda: health(url)["ready_replicas"] == 2)
        first = next(iter(victims := workers_of(before[1])))
        os.kill(first, signal.SIGKILL)  # the replica cannot go on without it
        wait_until(lambda: are_gone({**victims, before[1]: ""}))
        wait_until(lambda: health(url)["ready_replicas"] == 2)
        for _ in range(4):
            assert ask(url, "alpha") == (200, expected, None)
        everything = processes_of(process)
        own = {pid: title for pid, title in everything.items() if "Agent" not in title}
        assert sum("stallfree.executor.worker" in title for title in own.values()) == 4
        process.kill()
        wait_until(lambda: are_gone(own))


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
                with httpx.stream("GET", f"{url}/dashboard/feed?replica={place}") as feed:
                    snapshot, records = islice(filter(None, feed.iter_lines()), 2)
                assert f'"replica":{place}' in snapshot
                assert '"kind":"iteration"' in records
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


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this machine alone, with room for three processes."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(
        "local", num_cpus=3, include_dashboard=False, configure_logging=False, log_to_driver=False
    )
    yield
    ray.shutdown()


def worker_pids() -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.joinpath("cmdline").read_bytes().startswith(b"ray::_work"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.usefixtures("cluster")
def test_a_cluster_gives_what_one_process_gives_and_recovers(settings: EngineSettings) -> None:
    one = LLM.from_settings(replace(settings, distributed_executor="mp", restart_workers=False))
    expected = [each.outputs[0].token_ids for each in one.generate(PROMPTS, LONG)]
    two = LLM.from_settings(replace(settings, pipeline_parallel_size=2))
    for index, prompt in enumerate(PROMPTS):
        two.engine.add(str(index), two.tokenizer.encode(prompt), LONG)
    given: dict[str, list[int]] = {}
    for step in range(10_000):
        if step == 7:
            pids = worker_pids()
            assert len(pids) == 2
            os.kill(pids[0], signal.SIGKILL)
        for delta in two.engine.step():
            assert delta.error is None
            given.setdefault(delta.request_id, []).extend(delta.token_ids)
        if not two.engine.has_requests:
            break
    two.close()
    assert [tuple(given[str(index)]) for index in range(4)] == expected


@pytest.mark.usefixtures("cluster")
def test_a_cluster_without_room_is_refused(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stallfree.executor.ray_launch._PLACEMENT_TIMEOUT_S", 0.5)
    with pytest.raises(ConfigError, match=r"no room for 2 stages of \{'CPU': 64\}"):
        LLM.from_settings(replace(settings, pipeline_parallel_size=2, threads=64))

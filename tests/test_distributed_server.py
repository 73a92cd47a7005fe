"""A server whose model runs in several processes: nothing is left of it, however it ends."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny import save_tiny_model

KILLS = 10


@contextmanager
def server(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server with a tiny model in two processes, and its URL."""
    save_tiny_model(folder, "qwen2", initializer_range=0.2)
    command = [sys.executable, "-m", "stallfree.cli", "serve", str(folder), "--port", "0"]
    command += ["--dtype", "float32", "--kv-cache-memory", "4MiB", "--token-budget", "16"]
    command += ["--pipeline-parallel-size", "2", "--threads", "1", *arguments]
    output = folder / "server.txt"
    with output.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        while not (found := re.search(r"http://[\d.]+:\d+", output.read_text())):
            assert process.poll() is None, output.read_text()
            time.sleep(0.05)
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def workers(server_pid: int) -> list[int]:
    """The processes of the model."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            command = folder.joinpath("cmdline").read_text()
        except OSError:
            continue
        if parent == server_pid and "stallfree.executor.worker" in command:
            found.append(int(folder.name))
    return sorted(found)


def health(url: str) -> tuple[int, str]:
    """Of a server: the status of HTTP, and its own."""
    answer = httpx.get(f"{url}/health", timeout=60, trust_env=False)
    return answer.status_code, answer.json()["status"]


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def ask(url: str, prompt: str, max_tokens: int = 40) -> dict[str, Any]:
    body = {"model": "any", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    body |= {"ignore_eos": True}
    models = httpx.get(f"{url}/v1/models", timeout=60).json()
    body["model"] = models["data"][0]["id"]
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_survives_the_server(tmp_path: Path, how: signal.Signals) -> None:
    with server(tmp_path) as (process, url):
        own = workers(process.pid)
        assert len(own) == 2
        assert "choices" in ask(url, "alpha", 4)
        os.kill(process.pid, how)
        assert gone(own)


def test_without_restarts_the_server_says_who_was_lost_and_ends(tmp_path: Path) -> None:
    with server(tmp_path) as (process, url):
        own = workers(process.pid)
        os.kill(own[0], signal.SIGKILL)
        assert process.wait(30) == 1
        assert gone(own)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


@pytest.mark.slow
def test_answers_survive_ten_kills_at_random_moments(tmp_path: Path) -> None:
    prompts = [f"{word} beta gamma delta river" for word in ("alpha", "mountain", "code", "table")]
    with server(tmp_path, "--restart-workers") as (process, url):
        expected = {prompt: ask(url, prompt)["choices"][0]["text"] for prompt in prompts}
        rng = random.Random(0)
        wrong: list[object] = []
        num_answers, stop = [0], threading.Event()

        def client(prompt: str) -> None:
            while not stop.is_set():
                answer = ask(url, prompt)
                if "choices" not in answer or answer["choices"][0]["text"] != expected[prompt]:
                    wrong.append(answer)
                num_answers[0] += 1

        clients = [threading.Thread(target=client, args=(prompt,)) for prompt in prompts]
        for each in clients:
            each.start()
        seen: set[int] = set()
        for kill in range(KILLS):
            if kill % 2:
                before = num_answers[0]
                while num_answers[0] < before + 3:
                    assert process.poll() is None
                    time.sleep(0.05)
                time.sleep(rng.random() * 0.3)  # an answer takes less
            else:
                time.sleep(rng.random() * 3)  # while they are started anew
            while not (own := workers(process.pid)):
                assert process.poll() is None
                time.sleep(0.01)
            seen |= set(own)
            os.kill(rng.choice(own), signal.SIGKILL)
            while kill == 0 and health(url) != (503, "starting"):
                assert process.poll() is None
                time.sleep(0.01)
        before = num_answers[0]
        while num_answers[0] < before + len(prompts):
            assert any(each.is_alive() for each in clients)
            time.sleep(0.05)
        stop.set()
        for each in clients:
            each.join(120)
        assert not any(each.is_alive() for each in clients)
        assert wrong == []
        assert health(url) == (200, "ok")
        assert len(seen) > KILLS
        process.terminate()
        assert process.wait(60) == 0
        assert gone(sorted(seen))

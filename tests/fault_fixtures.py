"""What the tests of faults share: a server process that can fail, and what is left in it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny import save_tiny_model

SCRIPT = Path(__file__).with_name("fault_process.py")
TABLE_VARIABLE = "STALLFREE_FAULTS"  # a file to which the rows of the table of faults are added
START_TIMEOUT_S = 600.0  # a busy machine may have kernels to compile
TIMEOUT_S = 60.0
ENGINE = (
    *("--dtype", "float32", "--threads", "1", "--token-budget", "32"),
    *("--block-size", "4", "--kv-cache-memory", "8MiB"),
)
BODY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
# Differ between two moments of a server, or may.
_PASSING = (
    *("added", "refused", "ended", "ends", "rss_bytes"),
    *("iterations", "iterations_s", "failed_iterations"),
)


def model_in(folder: Path, max_position_embeddings: int = 4096) -> Path:
    """A tiny model."""
    return save_tiny_model(
        folder / "tiny", initializer_range=0.2, max_position_embeddings=max_position_embeddings
    )


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 32 MiB, where only root can have one; other tests are skipped."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Write a file until there is no room; the file."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return filler


def seconds_until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> float:
    """Wait for `condition`, which must come true in time; how long that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + timeout_s, "it never came true"
        time.sleep(0.005)
    return time.monotonic() - started


def note(fault: str, *, seen: str, healthy: str | float, lost: str = "nothing") -> None:
    """Add a row to the table of faults, if one is made (`benchmarks/faults.py`).

    Args:
        fault: what happened.
        seen: what clients saw of it.
        healthy: seconds until the server was healthy, or words.
        lost: of requests that had nothing to do with it, and of files.
    """
    if path := os.environ.get(TABLE_VARIABLE):
        row = {"fault": fault, "seen": seen, "lost": lost, "healthy": healthy}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Server:
    """A server process that answers at `url`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, url: str) -> None:
        self.process = process
        self.url = url
        self._log = log
        self.http = httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False)
        self.model = self.http.get("/v1/models").json()["data"][0]["id"]

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text(errors="replace")

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rsplit(":", 1)[1])

    def body(self, prompt: Any = "The river", **fields: Any) -> dict[str, Any]:
        """A greedy completion."""
        return {"model": self.model, "prompt": prompt, **BODY, **fields}

    def complete(self, prompt: Any = "The river", **fields: Any) -> httpx.Response:
        """Send one and wait for it."""
        return self.http.post("/v1/completions", json=self.body(prompt, **fields))

    def text(self, prompt: Any = "The river", **fields: Any) -> str:
        """The text of one, which must succeed."""
        answer = self.complete(prompt, **fields)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def fault(self, name: str | None) -> None:
        """Switch a fault on, or all off."""
        assert self.http.post("/fault", json={"name": name}).status_code == 200

    def watch(self) -> dict[str, Any]:
        """What is in it."""
        state: dict[str, Any] = self.http.get("/watch").json()
        return state

    def left(self) -> dict[str, Any]:
        """What should be the same whenever it idles."""
        return {name: value for name, value in self.watch().items() if name not in _PASSING}

    def check_nothing_left(self, before: Mapping[str, Any]) -> float:
        """Wait until nothing is left that was not there before; how long that took."""
        try:
            return seconds_until(lambda: self.left() == before, 10.0)
        except AssertionError:
            now = self.left()
            left = {name: (before[name], now[name]) for name in now if now[name] != before[name]}
            raise AssertionError(f"before and now: {left}") from None

    def is_healthy(self) -> bool:
        """Whether it takes requests."""
        try:
            return self.http.get("/health").status_code == 200
        except httpx.HTTPError:
            return False


@contextmanager
def server(
    model: Path,
    *arguments: str,
    port: int = 0,
    environment: Mapping[str, str] | None = None,
    engine: Sequence[str] = ENGINE,
) -> Iterator[Server]:
    """A server of a model, with flags of `stallfree serve`; it is killed in the end."""
    log = model.parent / f"server-{time.monotonic_ns()}.txt"
    process = start(model, *arguments, port=port, environment=environment, engine=engine, log=log)
    try:
        own = wait_for(process, log)
        with closing(own.http):
            yield own
    finally:
        process.kill()
        process.wait()


def start(
    model: Path,
    *arguments: str,
    log: Path,
    port: int = 0,
    environment: Mapping[str, str] | None = None,
    engine: Sequence[str] = ENGINE,
) -> subprocess.Popen[bytes]:
    """Start a server process."""
    command = [sys.executable, str(SCRIPT), "serve", str(model), "--port", str(port), *engine]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*command, *arguments],
            stdout=file,
            stderr=file,
            env={**os.environ, **(environment or {})},
        )


def wait_for(process: subprocess.Popen[bytes], log: Path) -> Server:
    """The server, once it answers."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (found := re.search(r"http://[\d.]+:\d+", log.read_text(errors="replace"))):
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, "it does not start"
        time.sleep(0.02)
    own = Server(process, log, found[0])
    seconds_until(own.is_healthy)
    return own


def workers(own: Server) -> list[int]:
    """The processes of a server's model, if it has several."""
    children = Path(f"/proc/{own.process.pid}/task")
    pids = [int(pid) for each in children.glob("*/children") for pid in each.read_text().split()]
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}
    return [pid for pid, title in titles.items() if "stallfree.executor.worker" in title]


class Stream:
    """A streamed completion in a thread, read to its end."""

    def __init__(self, server: Server, prompt: Any = "The river", **fields: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.status = 0
        self.error: Exception | None = None
        self._body = server.body(prompt, stream=True, **fields)
        self._http = httpx.Client(base_url=server.url, timeout=TIMEOUT_S, trust_env=False)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with self._http.stream("POST", "/v1/completions", json=self._body) as response:
                self.status = response.status_code
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        self.events.append(json.loads(line.removeprefix("data: ")))
        except Exception as error:
            self.error = error
        finally:
            self._http.close()

    def wait_for_events(self, count: int = 1) -> None:
        """Wait until so many have come."""
        seconds_until(lambda: len(self.events) >= count)

    def end(self) -> list[dict[str, Any]]:
        """All events, once it has ended."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        return self.events

    @property
    def text(self) -> str:
        """All text of its first choice, once it has ended well."""
        events = self.end()
        assert self.error is None
        assert "error" not in events[-1], events[-1]
        choices = [event["choices"][0] for event in events if event["choices"]]
        assert choices[-1]["finish_reason"] is not None
        return "".join(choice["text"] for choice in choices)


class Sent:
    """A completion that was sent, whose client reads nothing and leaves at will."""

    def __init__(self, server: Server, prompt: Any = "The river", **fields: Any) -> None:
        content = json.dumps(server.body(prompt, **fields)).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: it\r\nContent-Type: application/json\r\n"
        self._socket = socket.create_connection(("127.0.0.1", server.port))
        self._socket.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)

    def leave(self) -> float:
        """Close the connection; when that was."""
        self._socket.close()
        return time.monotonic()


def stop(own: Server, how: signal.Signals = signal.SIGTERM) -> int:
    """Send a signal and wait for the end; the exit code."""
    own.process.send_signal(how)
    return own.process.wait(TIMEOUT_S)

"""A real server for tests: a tiny model behind real HTTP, in a thread of this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import DefaultHttpxClient, OpenAI
from tiny import save_tiny_model

from stallfree.engine.async_engine import AsyncEngine
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.settings import EngineSettings, ServerSettings
from stallfree.replicas.front import ReplicatedEngine
from stallfree.server.app import create_app
from stallfree.server.lifecycle import ApiServer, bind

MODEL = "tiny"
IDLE_HEALTH = {
    "status": "ok",
    "running": 0,
    "waiting": 0,
    "squeezed_iterations": 0,
    "squeezed_s": 0.0,
}
START_TIMEOUT_S = 20.0
TIMEOUT_S = 30.0


def tiny_engine(folder: Path, max_model_len: int = 2048, **settings: Any) -> Engine:
    """An engine with a tiny Qwen2 of random weights, saved to `folder`."""
    path = save_tiny_model(folder / MODEL, max_position_embeddings=max_model_len)
    return build_engine(
        EngineSettings(model=str(path), threads=1, kv_cache_memory_bytes=64 << 20, **settings),
        show_progress=False,
    )


class RunningServer:
    """A server that answers at `url`."""

    def __init__(self, engine: Any, server: ApiServer, url: str) -> None:
        self.engine = engine
        self.server = server
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False)
        self.openai = self.client("none")

    def client(self, api_key: str) -> OpenAI:
        """An OpenAI client that sends `api_key`."""
        return OpenAI(
            base_url=f"{self.url}/v1",
            api_key=api_key,
            max_retries=0,
            http_client=DefaultHttpxClient(timeout=TIMEOUT_S, trust_env=False),
        )

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Send JSON."""
        return self.http.post(path, json=body)

    def is_idle(self) -> bool:
        """Whether the engine holds no request."""
        return bool(self.engine.num_running == 0 and self.engine.num_waiting == 0)


@contextmanager
def serve(engine: Engine | ReplicatedEngine, **settings: Any) -> Iterator[RunningServer]:
    """Serve `engine` on a free port; ends with a drain."""
    server_settings = ServerSettings(port=0, **settings)
    listener = bind(server_settings.host, 0)
    asynchronous = AsyncEngine(engine) if isinstance(engine, Engine) else engine
    app = create_app(asynchronous, server_settings)
    urls: list[str] = []
    ready = threading.Event()

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    server = ApiServer(app, app.state.service, app.state.notes, server_settings, on_ready)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    assert ready.wait(START_TIMEOUT_S)
    running = RunningServer(asynchronous, server, urls[0])
    try:
        yield running
    finally:
        running.http.close()
        running.openai.close()
        server.shut_down()
        thread.join(TIMEOUT_S)
        listener.close()
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for `condition`, which must come true within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without [DONE]")

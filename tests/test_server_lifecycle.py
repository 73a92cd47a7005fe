"""A server process from start to exit code: drain, a second signal, failure and death."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from hostile_clients import server_process
from server_fixtures import IDLE_HEALTH, MODEL, TIMEOUT_S, tiny_engine, wait_until
from server_process import DEADLY_TOKEN, FAILING_TOKEN
from tiny import save_tiny_model

from stallfree.engine.async_engine import AsyncEngine
from stallfree.engine.settings import ServerSettings
from stallfree.errors import ConfigError
from stallfree.server.app import run_server
from stallfree.server.lifecycle import bind, url_of

BODY: dict[str, Any] = {"model": MODEL, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(
        tmp_path_factory.mktemp("lifecycle") / MODEL, max_position_embeddings=32_768
    )


class Stream:
    """A streaming request in a thread, read to its end."""

    def __init__(self, client: httpx.Client, **fields: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self._client = client
        self._body = {**BODY, "prompt": "hi", "stream": True, **fields}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        wait_until(lambda: bool(self.events))

    def _read(self) -> None:
        try:
            with self._client.stream("POST", "/v1/completions", json=self._body) as response:
                for line in response.iter_lines():
                    if line and line != "data: [DONE]":
                        self.events.append(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.error = error

    def end(self) -> list[dict[str, Any]]:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        return self.events


def test_a_signal_drains(folder: Path) -> None:
    with server_process(folder) as (server, client):
        stream = Stream(client, max_tokens=1500)
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json()["status"] == "draining"
        refused = client.post("/v1/completions", json={**BODY, "prompt": "hi"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["type"] == "server_error"
        last = stream.end()[-1]
        assert last["choices"][0]["finish_reason"] == "length"
        _, stderr = server.communicate(timeout=TIMEOUT_S)
        assert server.returncode == 0
        assert "Traceback" not in stderr


def test_what_outlasts_the_drain_is_cut_off(folder: Path) -> None:
    with server_process(folder, drain_timeout_s=0.3) as (server, client):
        stream = Stream(client, max_tokens=30_000)
        server.send_signal(signal.SIGTERM)
        assert stream.end()[-1]["error"]["type"] == "server_error"
        _, stderr = server.communicate(timeout=TIMEOUT_S)
        assert server.returncode == 0
        assert "cut off" in stderr


def test_a_second_signal_ends_at_once(folder: Path) -> None:
    with server_process(folder) as (server, client):
        stream = Stream(client, max_tokens=30_000)
        server.send_signal(signal.SIGINT)
        wait_until(lambda: client.get("/health").status_code == 503)
        started = time.monotonic()
        server.send_signal(signal.SIGINT)
        _, stderr = server.communicate(timeout=TIMEOUT_S)
        assert time.monotonic() - started < 3.0
        assert server.returncode == 128 + signal.SIGINT
        assert "Traceback" not in stderr
        stream.end()
        assert stream.error is not None


def test_a_failed_iteration_fails_only_its_requests(folder: Path) -> None:
    with server_process(folder) as (server, client):
        failing = {**BODY, "prompt": [FAILING_TOKEN]}
        answer = client.post("/v1/completions", json=failing)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text
        (streamed,) = Stream(client, prompt=[FAILING_TOKEN]).end()
        assert streamed["error"]["type"] == "server_error"
        assert "secret" not in json.dumps(streamed)
        assert client.get("/health").json() == IDLE_HEALTH
        assert client.post("/v1/completions", json={**BODY, "prompt": "hi"}).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(TIMEOUT_S) == 0


def test_the_process_ends_with_its_engine(folder: Path) -> None:
    with server_process(folder) as (server, client):
        stream = Stream(client, max_tokens=30_000)
        answer = client.post("/v1/completions", json={**BODY, "prompt": [DEADLY_TOKEN]})
        assert answer.status_code in (500, 503)
        assert "secret" not in answer.text
        last = stream.end()[-1]
        assert last["error"]["type"] == "server_error"
        assert "secret" not in json.dumps(last)
        server.communicate(timeout=TIMEOUT_S)
        assert server.returncode == 1


def test_a_host_that_is_no_name() -> None:
    with pytest.raises(ConfigError, match=r"'a\.\.b' is not a name or an address"):
        bind("a..b", 0)


def test_a_port_in_use(tmp_path: Path) -> None:
    engine = AsyncEngine(tiny_engine(tmp_path))
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
            run_server(engine, ServerSettings(port=port), pytest.fail)


@pytest.mark.parametrize(
    ("host", "said"), [("no.such.host.invalid", "cannot listen on"), ("192.0.2.1", "192.0.2.1")]
)
def test_an_address_of_no_use(host: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        bind(host, 0)


@pytest.mark.parametrize(("host", "url"), [("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1")])
def test_url(host: str, url: str) -> None:
    with bind(host, 0) as listener:
        assert url_of(listener) == f"http://{url}:{listener.getsockname()[1]}"

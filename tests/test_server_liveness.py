"""Clients that leave, and long work: neither costs the others anything."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from server_fixtures import IDLE_HEALTH, MODEL, RunningServer, serve, tiny_engine, wait_until

LONG: dict[str, Any] = {"model": MODEL, "temperature": 0, "ignore_eos": True}
CONTEXT = 16_384
HEALTH_S = 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    engine = tiny_engine(tmp_path_factory.mktemp("liveness"), max_model_len=CONTEXT)
    with serve(engine) as running:
        yield running


@pytest.fixture
def idle_after(server: RunningServer, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing may be left of a request whose client has left, not even a line in the log."""
    yield
    wait_until(server.is_idle, timeout_s=2.0)
    server.engine.engine.scheduler.check_integrity()
    assert not caplog.records
    assert server.http.get("/health").json() == IDLE_HEALTH


BODIES = [
    ("/v1/completions", {"prompt": "hi", "max_tokens": 8000}),
    ("/v1/completions", {"prompt": "hi", "max_tokens": 8000, "n": 3}),
    ("/v1/completions", {"prompt": ["hi", "river", "stone"], "max_tokens": 5000, "n": 2}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
]


@pytest.mark.usefixtures("idle_after")
@pytest.mark.parametrize(("path", "fields"), BODIES)
def test_a_client_leaves_its_stream(
    server: RunningServer, path: str, fields: dict[str, Any]
) -> None:
    with httpx.stream(
        "POST", server.url + path, json={**LONG, **fields, "stream": True}, trust_env=False
    ) as response:
        lines = response.iter_lines()  # without a name it would be closed, and the connection too
        next(lines)
        wait_until(lambda: server.engine.num_running > 0, timeout_s=2.0)


@pytest.mark.usefixtures("idle_after")
@pytest.mark.parametrize(("path", "fields"), BODIES)
def test_a_client_leaves_before_its_answer(
    server: RunningServer, path: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + path, json={**LONG, **fields}, timeout=0.2, trust_env=False)


@pytest.mark.usefixtures("idle_after")
def test_a_client_leaves_during_its_prefill(server: RunningServer) -> None:
    body = {**LONG, "prompt": [5] * (CONTEXT - 10), "max_tokens": 5, "stream": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/completions", json=body, timeout=0.3, trust_env=False)


@pytest.mark.usefixtures("idle_after")
def test_a_client_leaves_while_it_sends(server: RunningServer) -> None:
    def body() -> Iterator[bytes]:
        yield b'{"model": '
        raise ConnectionError("the client is gone")

    with pytest.raises(ConnectionError):
        httpx.post(server.url + "/v1/completions", content=body(), trust_env=False)


@pytest.mark.usefixtures("idle_after")
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": [5] * (CONTEXT - 10), "max_tokens": 5}),
        ("/v1/completions", {"prompt": "river mountain " * 65_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab " * 330_000}]}),
        ("/tokenize", {"prompt": "river mountain " * 65_000}),
    ],
    ids=["prefill", "huge prompt", "huge chat", "huge tokenize"],
)
def test_health_answers_during_long_work(
    server: RunningServer, path: str, fields: dict[str, Any]
) -> None:
    worst_s = 0.0
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(server.post, path, {"model": MODEL, **fields})
        while not work.done():
            started = time.monotonic()
            assert server.http.get("/health").status_code == 200
            worst_s = max(worst_s, time.monotonic() - started)
            time.sleep(0.01)
    assert work.result().status_code in (200, 400)
    assert worst_s < HEALTH_S


def test_a_short_prompt_does_not_wait_for_a_huge_one(server: RunningServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(server.post, "/tokenize", {"prompt": "river mountain " * 65_000})
        wait_until(work.running)
        num_short = 0
        while not work.done():
            assert server.post("/tokenize", {"prompt": "river"}).status_code == 200
            num_short += 1
    assert num_short > 3

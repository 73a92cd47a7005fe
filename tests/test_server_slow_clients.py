"""Clients that send or read slowly, or not at all: they are cut off, and others notice nothing."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from hostile_clients import RawClient, server_process
from server_fixtures import (
    IDLE_HEALTH,
    MODEL,
    RunningServer,
    events,
    serve,
    tiny_engine,
    wait_until,
)
from tiny import save_tiny_model

from stallfree.engine.engine import Engine

COMPLETIONS = "/v1/completions"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "ignore_eos": True}
CONTEXT = 16_384
NUM_SLOW = 50
TIMEOUT_S = 0.6
RECEIVE_BUFFER = 4096


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("slow"), max_model_len=CONTEXT)


@pytest.fixture
def server(engine: Engine) -> Iterator[RunningServer]:
    settings = {
        "header_timeout_s": TIMEOUT_S,
        "body_timeout_s": TIMEOUT_S,
        "unread_timeout_s": TIMEOUT_S,
        "max_unread_bytes": 8192,
    }
    with serve(engine, **settings) as running:
        yield running
        wait_until(running.is_idle)
        engine.scheduler.check_integrity()


def stream(http: httpx.Client, **fields: Any) -> Iterator[str]:
    """The texts of a streamed completion."""
    body = {**GREEDY, "prompt": "A prompt is read in chunks", "stream": True, **fields}
    with http.stream("POST", COMPLETIONS, json=body) as response:
        for event in events(response.iter_lines()):
            yield event["choices"][0]["text"]


class Bystander:
    """A client that reads its streams to the end, one after the other, until it is told to stop."""

    def __init__(self, http: httpx.Client, max_tokens: int = 500) -> None:
        self._http, self._max_tokens = http, max_tokens
        self.undisturbed = self._text()
        self.texts: list[str] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _text(self) -> str:
        return "".join(stream(self._http, max_tokens=self._max_tokens))

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.texts.append(self._text())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        assert self.texts
        assert set(self.texts) == {self.undisturbed}


HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "
BODY_HEAD = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n"


@pytest.mark.parametrize("begun", [HEAD, BODY_HEAD], ids=["head", "body"])
def test_many_requests_that_trickle_in(server: RunningServer, begun: bytes) -> None:
    with Bystander(server.http), ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.url)) for _ in range(NUM_SLOW)]
        for client in clients:
            client.send(begun)
        sending = set(clients)
        while sending:  # a byte now and then, so that no time without one is long
            sending = {client for client in sending if client.send(b"x")}
            time.sleep(0.05)
        wait_until(lambda: len(server.server.server_state.connections) == 1)


@pytest.mark.parametrize(
    ("begun", "said"),
    [
        (HEAD, "the head of the request took over the 0.6 s allowed"),
        (BODY_HEAD, "the body of the request took over the 0.6 s allowed"),
        (BODY_HEAD.replace(b"Content-Length: 9999", b"Transfer-Encoding: chunked"), "the body"),
    ],
)
def test_a_request_that_stops_is_told_so(server: RunningServer, begun: bytes, said: str) -> None:
    with RawClient(server.url) as client:
        client.send(begun)
        answer = client.answer()
    assert answer.status == 408
    assert said in answer.error()["message"]
    assert answer.headers["connection"] == "close"


def test_a_connection_that_asks_nothing_is_closed(server: RunningServer) -> None:
    with RawClient(server.url) as client:
        assert client.read_to_end() == b""


def test_a_body_that_nobody_waits_for_ends_too(server: RunningServer) -> None:
    with RawClient(server.url) as client:
        client.send(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n")
        answer = client.answer()
    assert answer.status == 404


def test_a_connection_may_rest_between_requests(server: RunningServer) -> None:
    request = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    with RawClient(server.url) as client:
        client.send(request)
        assert client.read_until(b"}").startswith(b"HTTP/1.1 200")
        time.sleep(2 * TIMEOUT_S)
        client.send(request[:20])
        client.send(request[20:])
        assert client.read_until(b"}").startswith(b"HTTP/1.1 200")
        client.send(request[:20])
        assert client.answer().status == 408


def test_a_stream_that_nobody_reads(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "stallfree.server")
    with RawClient(server.url, RECEIVE_BUFFER) as client:
        client.post(COMPLETIONS, {**GREEDY, "prompt": "hi", "stream": True, "max_tokens": 16_000})
        wait_until(lambda: server.engine.num_running == 1)
        wait_until(server.is_idle, timeout_s=60)
        assert b"[DONE]" not in client.read_to_end()
    assert "bytes unread" in caplog.text
    wait_until(lambda: not server.server.server_state.connections)


BIG: dict[str, Any] = {
    **GREEDY,
    "prompt": [5] * 1500,
    "echo": True,
    "logprobs": 20,
    "max_tokens": 4,
}


def test_an_answer_that_nobody_reads(server: RunningServer) -> None:
    with RawClient(server.url, RECEIVE_BUFFER) as client:
        client.post(COMPLETIONS, BIG)
        wait_until(lambda: bool(server.server.server_state.connections))
        wait_until(lambda: not server.server.server_state.connections, timeout_s=30)
        assert len(client.read_to_end()) < len(server.post(COMPLETIONS, BIG).content)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_reads_slowly_gets_all(server: RunningServer, streamed: bool) -> None:
    """One event, or one answer, may be far larger than what may wait for its client."""
    body = {**BIG, "stream": streamed}
    whole = server.post(COMPLETIONS, body).content
    assert len(whole) > 400_000
    with RawClient(server.url, RECEIVE_BUFFER) as client:
        client.post(COMPLETIONS, body, "Connection: close\r\n")
        data = bytearray()
        while piece := client.socket.recv(32_768):
            data += piece
            time.sleep(0.01)
    assert len(data) > len(whole)
    assert (b"[DONE]" in data) == streamed


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_slow_readers_beside_one_that_reads(tmp_path: Path) -> None:
    """In a process of its own: nothing is left over, and the others' answers stay what they are."""
    folder = save_tiny_model(tmp_path / MODEL, max_position_embeddings=CONTEXT)
    body = {**GREEDY, "prompt": "hi", "stream": True, "max_tokens": CONTEXT - 100}
    with server_process(folder, max_unread_bytes=32_768) as (process, http):
        files = Path(f"/proc/{process.pid}/fd")
        with Bystander(http):
            before = len(os.listdir(files))
            with ExitStack() as stack:
                url = str(http.base_url)
                slow = [
                    stack.enter_context(RawClient(url, RECEIVE_BUFFER)) for _ in range(NUM_SLOW)
                ]
                for client in slow:
                    client.post(COMPLETIONS, body)
                wait_until(lambda: len(os.listdir(files)) >= before + NUM_SLOW)
                wait_until(lambda: len(os.listdir(files)) <= before + 1, timeout_s=120)
                assert not any(b"[DONE]" in client.read_to_end() for client in slow)
        wait_until(lambda: http.get("/health").json() == IDLE_HEALTH)
        assert len(os.listdir(files)) <= before + 1

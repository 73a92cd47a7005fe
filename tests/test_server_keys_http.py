"""A server with keys of several clients: the limits of each, who watches it, keys read again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from hostile_clients import RawClient, server_process
from server_fixtures import IDLE_HEALTH, MODEL, RunningServer, serve, tiny_engine, wait_until
from tiny import save_tiny_model

from stallfree.engine.engine import Engine
from stallfree.errors import InvalidRequestError
from stallfree.server.dashboard import MAX_WATCHERS_OF_A_KEY
from stallfree.server.service import Service

ALICE, BOB, CAROL = "alice-secret-1", "bob-secret-2", "carol-secret-3"
COMPLETIONS = "/v1/completions"
FEED = "/dashboard/feed"
BODY: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(0o600)
    return path


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("keys"), max_model_len=16_384)


@pytest.fixture
def server(engine: Engine, file: Path) -> Iterator[RunningServer]:
    file.write_text(f"alice:{ALICE} rate=3/min\nbob:{BOB} concurrency=1\ncarol:{CAROL}\n")
    with serve(engine, api_keys_file=file) as running:
        yield running
        wait_until(running.is_idle)


def test_limits_of_a_key_are_its_own(server: RunningServer) -> None:
    def post(key: str, **fields: Any) -> httpx.Response:
        return server.http.post(COMPLETIONS, json={**BODY, **fields}, headers=bearer(key))

    assert [post(ALICE).status_code for _ in range(3)] == [200] * 3
    refused = post(ALICE)
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "'alice' may send 3 requests in 60 s" in error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert post(CAROL).status_code == 200
    assert post("neither-of-them").status_code == 401
    long = {**BODY, "max_tokens": 16_000, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", COMPLETIONS, json=long, headers=bearer(BOB)) as answer:
        lines = answer.iter_lines()
        next(lines)
        refused = post(BOB)
        assert refused.status_code == 429
        assert (
            "'bob' has as many requests under way as it may: 1"
            in refused.json()["error"]["message"]
        )
        assert int(refused.headers["retry-after"]) >= 1
        assert post(CAROL).status_code == 200
    wait_until(lambda: post(BOB).status_code == 200)
    assert post(BOB, n=0).status_code == 400
    assert post(BOB).status_code == 200


REFUSED_FIRST: list[dict[str, Any]] = [
    {"json": {**BODY, "prompt": "river " * 20_000}},
    {"json": {**BODY, "prompt": [5] * 20_000}},
    {"json": {**BODY, "model": "another", "n": 0}},
    {"content": b"x" * (2 << 20)},
    {"content": b"{"},
    {"content": b"{}", "headers": {"Content-Type": "text/plain"}},
]


@pytest.mark.parametrize("asked", REFUSED_FIRST, ids=range(len(REFUSED_FIRST)))
def test_a_key_and_its_limits_come_before_all_that_costs(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    """Whatever else is wrong with a request; and its text is not looked at."""

    def status(key: str, path: str) -> int:
        headers = {**asked.get("headers", {}), **bearer(key)}
        answer = server.http.post(path, **{**asked, "headers": headers})
        if answer.status_code == 429:
            assert "'alice' may send 3 requests" in answer.json()["error"]["message"]
        return answer.status_code

    paths = (COMPLETIONS, "/v1/chat/completions", "/tokenize", "/detokenize")
    good: dict[str, Any] = {"json": BODY, "headers": bearer(ALICE)}
    assert [server.http.post(COMPLETIONS, **good).status_code for _ in range(3)] == [200] * 3

    async def look(*_: object) -> None:
        raise InvalidRequestError("it is looked at")

    for name in ("prompt", "chat_prompt", "encode", "decode"):
        monkeypatch.setattr(Service, name, look)
    for path in paths:
        assert status(ALICE, path) == 429
        assert status("neither-of-them", path) == 401
        assert status(BOB, path) in (400, 404, 413, 415)


def test_nothing_is_read_for_a_key_over_its_limit(server: RunningServer) -> None:
    for _ in range(3):
        assert server.http.post(COMPLETIONS, json=BODY, headers=bearer(ALICE)).status_code == 200
    with RawClient(server.url) as client:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n"
        client.send(f"{head}Content-Length: 100\r\nConnection: close\r\n\r\n".encode())
        assert client.read_until(b"}").startswith(b"HTTP/1.1 429")


def test_who_watches_takes_nothing_from_requests(server: RunningServer) -> None:
    def status(key: str, path: str = "/metrics") -> int:
        return server.http.get(path, headers=bearer(key)).status_code

    def post(key: str) -> int:
        return server.http.post(COMPLETIONS, json=BODY, headers=bearer(key)).status_code

    with ExitStack() as stack:
        for _ in range(2):  # more than bob may have of requests
            watch = server.http.stream("GET", FEED, headers=bearer(BOB))
            assert stack.enter_context(watch).status_code == 200
        assert [post(BOB) for _ in range(2)] == [200] * 2
        long = {**BODY, "max_tokens": 16_000, "stream": True, "ignore_eos": True}
        with server.http.stream("POST", COMPLETIONS, json=long, headers=bearer(BOB)) as answer:
            lines = answer.iter_lines()  # kept: without it the answer would be closed
            next(lines)
            assert post(BOB) == 429
            assert status(BOB) == 200
    assert [status(ALICE) for _ in range(4)] == [200, 200, 200, 429]  # as often as her rate
    assert [post(ALICE) for _ in range(4)] == [200, 200, 200, 429]


def test_one_key_does_not_take_all_places_of_those_who_watch(server: RunningServer) -> None:
    with ExitStack() as stack:
        for _ in range(MAX_WATCHERS_OF_A_KEY):
            watch = server.http.stream("GET", FEED, headers=bearer(CAROL))
            assert stack.enter_context(watch).status_code == 200
        refused = server.http.get(FEED, headers=bearer(CAROL))
        assert refused.status_code == 429
        assert "'carol' watches 4 times already" in refused.json()["error"]["message"]
        with server.http.stream("GET", FEED, headers=bearer(BOB)) as other:
            assert other.status_code == 200


def test_whose_a_request_is(server: RunningServer, engine: Engine) -> None:
    users: list[str] = []

    class Watching:
        def added(self, request: Any) -> None:
            users.append(request.targets.user)

        def refused(self, *_: Any, **__: Any) -> None: ...
        def iterated(self, *_: Any, **__: Any) -> None: ...
        def ended(self, *_: Any, **__: Any) -> None: ...

    engine.observers.add(Watching())
    for fields in ({}, {"user": "bob"}, {"safety_identifier": "x"}):
        answer = server.http.post(COMPLETIONS, json={**BODY, **fields}, headers=bearer(CAROL))
        assert answer.status_code == 200
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    answer = server.http.post("/v1/chat/completions", json=chat, headers=bearer(CAROL))
    assert answer.status_code == 200
    assert users == ["carol", "carol/bob", "carol/x", "carol"]


def test_a_hang_up_reads_the_file_again(tmp_path: Path, file: Path) -> None:
    folder = save_tiny_model(tmp_path / MODEL)

    def is_taken(key: str) -> bool:
        return client.get("/v1/models", headers=bearer(key)).status_code == 200

    file.write_text(f"alice:{ALICE}\n")
    with server_process(folder, api_keys_file=file) as (process, client):
        assert is_taken(ALICE)
        assert not is_taken(BOB)
        file.write_text(f"bob:{BOB}\n")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: is_taken(BOB))
        assert not is_taken(ALICE)
        file.write_text("broken")
        process.send_signal(signal.SIGHUP)
        assert client.get("/health").json() == IDLE_HEALTH
        assert is_taken(BOB)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate()
        assert process.returncode == 0
        assert "line 1: it does not begin with NAME:KEY" in log
        assert ALICE not in log
        assert BOB not in log


def test_a_hang_up_without_keys_changes_nothing(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / MODEL)
    with server_process(folder) as (process, client):
        process.send_signal(signal.SIGHUP)
        for _ in range(3):
            assert client.post(COMPLETIONS, json=BODY).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate()
        assert (process.returncode, log) == (0, "")

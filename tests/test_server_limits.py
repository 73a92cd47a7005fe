"""The limits of requests and of their number: each is an option, and a refusal names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hostile_clients import RawClient
from server_fixtures import MODEL, RunningServer, serve, tiny_engine, wait_until

from stallfree.engine.engine import Engine
from stallfree.engine.settings import ServerSettings
from stallfree.errors import ConfigError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
LIMITS: dict[str, Any] = {
    "max_body_bytes": 2000,
    "max_header_bytes": 1500,
    "max_headers": 20,
    "max_prompt_tokens": 30,
    "max_prompts": 4,
    "max_n": 3,
    "max_completions": 6,
    "max_logprobs": 2,
    "max_stop_strings": 2,
    "max_stop_string_chars": 10,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("limits"), max_model_len=16_384)


@pytest.fixture
def server(engine: Engine, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    with serve(engine, **request.param) as running:
        yield running
        wait_until(running.is_idle)
        engine.scheduler.check_integrity()


with_limits = pytest.mark.parametrize("server", [LIMITS], indirect=True, ids=["limits"])


@with_limits
@pytest.mark.parametrize(
    ("path", "fields", "param", "said"),
    [
        (COMPLETIONS, {"prompt": [5] * 31}, "prompt", "has 31 tokens; the limit of this server is"),
        (COMPLETIONS, {"prompt": ["a"] * 5}, "prompt", "5 prompts; the limit of one request is 4"),
        (COMPLETIONS, {"prompt": ["a"] * 4, "n": 2}, "prompt", "8 completions; the limit of one"),
        (COMPLETIONS, {"prompt": "a", "n": 4}, "n", "n is 4; the limit of this server is 3"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 3}, "logprobs", "logprobs is 3; the limit of"),
        (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 3}, "prompt_logprobs", "is 3; the limit"),
        (
            COMPLETIONS,
            {"prompt": "a", "stop": ["a", "b", "c"]},
            "stop",
            "3 strings; the limit is 2",
        ),
        (
            COMPLETIONS,
            {"prompt": "a", "stop": ["x" * 11]},
            "stop",
            "11 characters; the limit is 10",
        ),
        (CHAT, {"messages": [{"role": "user", "content": "river " * 40}]}, "messages", "is 30"),
        (CHAT, {"messages": [USER], "n": 4}, "n", "n is 4; the limit of this server is 3"),
        (
            CHAT,
            {"messages": [USER], "logprobs": True, "top_logprobs": 3},
            "top_logprobs",
            "top_logprobs is 3; the limit of this server is 2",
        ),
    ],
)
def test_what_one_request_asks_for(
    server: RunningServer, path: str, fields: dict[str, Any], param: str, said: str
) -> None:
    answer = server.post(path, {"model": MODEL, "max_tokens": 2, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert said in error["message"]


@with_limits
def test_just_within_the_limits(server: RunningServer) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"prompt": [5] * 30, "stop": ["x" * 10, "y"], "logprobs": 2}),
        (COMPLETIONS, {"prompt": ["a"] * 4}),
        (COMPLETIONS, {"prompt": ["a"] * 2, "n": 3}),
        (CHAT, {"messages": [USER], "n": 3, "logprobs": True, "top_logprobs": 2}),
    ]
    for path, fields in bodies:
        answer = server.post(path, {"model": MODEL, "max_tokens": 2, **fields})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("server", [{"max_prompt_tokens": 30}], indirect=True)
def test_the_narrower_of_two_limits_is_named(server: RunningServer) -> None:
    """Of token ids that neither the server nor the context would take."""
    answer = server.post(COMPLETIONS, {"model": MODEL, "prompt": [5] * 20_000})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message == "the prompt has 20000 tokens; the limit of this server is 30"


@with_limits
def test_the_body(server: RunningServer) -> None:
    answer = server.post(COMPLETIONS, {"model": MODEL, "prompt": "x" * 2000})
    assert answer.status_code == 413
    assert answer.json()["error"]["message"].endswith("the limit is 2000 bytes")


@with_limits
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing"])
@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("A: b\r\n" * 23, "25 headers; the limit is 20"),
        (f"A: {'b' * 1600}\r\n", "bytes; the limit is 1500"),
    ],
)
def test_a_head_that_comes_whole(server: RunningServer, path: str, head: str, said: str) -> None:
    with RawClient(server.url) as client:
        client.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n{head}Connection: close\r\n\r\n".encode())
        answer = client.answer()
    assert answer.status == 431
    assert said in answer.error()["message"]


@with_limits
@pytest.mark.parametrize(
    "head", [b"GET /" + b"x" * 4000, b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 300_000]
)
def test_a_head_without_end(server: RunningServer, head: bytes) -> None:
    with RawClient(server.url) as client:
        client.send(head)
        answer = client.answer()
    assert answer.status == 431
    assert "the limit is 1500" in answer.error()["message"]
    assert answer.headers["connection"] == "close"


@with_limits
@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01", b"hello\r\n\r\n", b"\r\n\r\n"])
def test_what_is_no_http(server: RunningServer, data: bytes) -> None:
    with RawClient(server.url) as client:
        client.send(data + b"\r\n")
        answer = client.answer()
    assert answer.status == 400
    assert "not an HTTP request" in answer.error()["message"]


@pytest.mark.parametrize("server", [{"max_connections": 3}], indirect=True)
def test_open_connections(server: RunningServer) -> None:
    assert server.http.get("/health").status_code == 200  # and stays connected
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(RawClient(server.url))
        with RawClient(server.url) as client:
            answer = client.answer()
        assert answer.status == 429
        assert "3 connections are open; the limit is 3" in answer.error()["message"]
        assert answer.error()["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) > 0
        assert server.http.get("/health").status_code == 200
    wait_until(lambda: len(server.server.server_state.connections) == 1)
    with RawClient(server.url) as client:
        client.send(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.answer().status == 200


LONG: dict[str, Any] = {
    "model": MODEL,
    "prompt": "hi",
    "max_tokens": 15_000,
    "stream": True,
    "ignore_eos": True,
}


@pytest.mark.parametrize("server", [{"max_concurrent_requests": 2}], indirect=True)
def test_requests_under_way(server: RunningServer) -> None:
    with ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(RawClient(server.url))
            client.post(COMPLETIONS, LONG)
            assert client.socket.recv(1000).startswith(b"HTTP/1.1 200")
        for answer in (server.post(COMPLETIONS, LONG), server.http.get("/v1/models")):
            assert answer.status_code == 429
            error = answer.json()["error"]
            assert "2 requests are under way; the limit is 2" in error["message"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert int(answer.headers["retry-after"]) > 0
        assert server.http.get("/health").status_code == 200
    wait_until(server.is_idle)  # the clients of both have left
    for _ in range(3):  # neither an answer nor an error keeps a place
        wait_until(lambda: server.http.get("/v1/models").status_code == 200)
        assert server.post(COMPLETIONS, {**LONG, "n": 0}).status_code == 400


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_body_bytes": 0}, "max_body_bytes is 0; it must be at least 1"),
        ({"max_headers": 0}, "max_headers is 0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0; it must be at least 1"),
        ({"max_prompts": 0}, "max_prompts is 0"),
        ({"max_n": 129}, "max_n is 129; it must be at least 1 and at most 128"),
        ({"max_logprobs": 21}, "max_logprobs is 21; it must be at least 0 and at most 20"),
        ({"max_stop_strings": -1}, "max_stop_strings is -1; it must be at least 0 and at most 16"),
        ({"max_stop_string_chars": 0}, "max_stop_string_chars is 0"),
        ({"max_connections": 0}, "max_connections is 0"),
        ({"max_concurrent_requests": 0}, "max_concurrent_requests is 0"),
        ({"header_timeout_s": 0.0}, "header_timeout_s is 0.0; it must be at least 0.1"),
        ({"body_timeout_s": float("inf")}, "body_timeout_s is inf; it must be finite"),
        ({"unread_timeout_s": 0}, "unread_timeout_s is 0"),
        ({"max_unread_bytes": 0}, "max_unread_bytes is 0"),
        ({"cors_origin": ("example.org",)}, "cors_origin is 'example.org'; write it as https://"),
        ({"cors_origin": ("https://a.org/",)}, "cors_origin is 'https://a.org/'"),
    ],
)
def test_limits_that_are_none(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerSettings(**fields)
    assert str(caught.value).startswith(message)

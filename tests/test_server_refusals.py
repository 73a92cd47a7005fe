"""Answers of a connection itself: they have an id, a line of the log and a count as others have."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hostile_clients import Answer, RawClient
from server_fixtures import RunningServer, serve, tiny_engine, wait_until

from stallfree.engine.engine import Engine

TIMEOUT_S = 0.6
HEADER = "x-request-id"
BODY_HEAD = b"POST /tokenize HTTP/1.1\r\nHost: x\r\n"
LENGTH = b"Content-Length: 9999\r\n\r\n"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("refusals"))


@pytest.fixture
def server(engine: Engine) -> Iterator[RunningServer]:
    settings = {
        "header_timeout_s": TIMEOUT_S,
        "body_timeout_s": TIMEOUT_S,
        "max_header_bytes": 1500,
        "max_connections": 3,
    }
    with serve(engine, **settings) as running:
        yield running


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, "stallfree"):
        yield caplog


def answer_to(server: RunningServer, data: bytes) -> Answer:
    with RawClient(server.url) as client:
        client.send(data)
        return client.answer()


def lines(log: pytest.LogCaptureFixture, request_id: str) -> list[tuple[object, object]]:
    """Status and endpoint of each line of a request."""
    fields = [vars(each)["fields"] for each in log.records if each.name == "stallfree.request"]
    return [(f["status"], f["endpoint"]) for f in fields if f["request_id"] == request_id]


def count(server: RunningServer, status: int, endpoint: str) -> int:
    """How many such answers `/metrics` tells of."""
    text = server.http.get("/metrics").text
    pattern = rf'http_requests_total{{endpoint="{endpoint}",status="{status}"}} (\d+)'
    found = re.search(pattern, text)
    return 0 if found is None else int(found[1])


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nX-Request-Id: mine\r\n", 408),
        (b"GET /health HTTP/1.1\r\nX-Request-Id: mine\r\nA: " + b"b" * 9000, 431),
    ],
)
def test_what_is_no_request_yet_gets_a_new_id(
    server: RunningServer, log: pytest.LogCaptureFixture, data: bytes, status: int
) -> None:
    answers = [answer_to(server, data) for _ in range(2)]
    ids = [answer.headers[HEADER] for answer in answers]
    assert [answer.status for answer in answers] == [status] * 2
    assert all(re.fullmatch(r"[0-9a-f]{32}", each) for each in ids)
    assert len(set(ids)) == 2
    for each in ids:
        assert lines(log, each) == [(status, "other")]
    assert count(server, status, "other") == 2


@pytest.mark.parametrize(
    ("head", "expected"),
    [(b"X-Request-Id: mine.1\r\n", "mine.1"), (b"X-Request-Id: not clean\r\n", "[0-9a-f]{32}")],
)
@pytest.mark.parametrize(
    ("rest", "status"),
    [(LENGTH, 408), (b"Transfer-Encoding: chunked\r\n\r\nno length\r\n", 400)],
)
def test_a_request_whose_body_is_wrong_has_its_own(
    server: RunningServer,
    log: pytest.LogCaptureFixture,
    head: bytes,
    expected: str,
    rest: bytes,
    status: int,
) -> None:
    """It has one line, with the status that its client saw."""
    before = count(server, status, "/tokenize")
    answer = answer_to(server, BODY_HEAD + head + rest)
    assert answer.status == status
    request_id = answer.headers[HEADER]
    assert re.fullmatch(expected, request_id)
    wait_until(lambda: bool(lines(log, request_id)))
    assert lines(log, request_id) == [(status, "/tokenize")]
    assert count(server, status, "/tokenize") == before + 1


def test_one_connection_too_many(server: RunningServer, log: pytest.LogCaptureFixture) -> None:
    assert server.http.get("/health").status_code == 200  # and stays connected
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(RawClient(server.url))
        with RawClient(server.url) as client:
            answer = client.answer()
    assert answer.status == 429
    assert lines(log, answer.headers[HEADER]) == [(429, "other")]
    assert count(server, 429, "other") == 1


def test_what_comes_after_an_answer_is_not_counted(
    server: RunningServer, log: pytest.LogCaptureFixture
) -> None:
    """The answer to a request whose body is never sent has gone out; there is no second."""
    head = b"POST /nothing HTTP/1.1\r\nHost: x\r\nX-Request-Id: early\r\n"
    answer = answer_to(server, head + LENGTH)
    assert answer.status == 404
    assert lines(log, "early") == [(404, "other")]
    assert count(server, 408, "other") == 0

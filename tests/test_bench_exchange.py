"""One request and its answer: good ones, and those that fail in every way."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
import pytest
from fake_server import (
    SSE_HEAD,
    Answer,
    Asked,
    answer_in_full,
    event,
    fake_server,
    fixed,
    requests,
    response,
    run,
    token,
    usage,
)

from stallfree.bench.endpoint import Endpoint
from stallfree.bench.exchange import exchange
from stallfree.bench.metrics import summarize
from stallfree.bench.records import Failure, Record
from stallfree.bench.workload import Arrival, Workload

NESTED = b"[" * 100_000


def told(counts: bytes) -> bytes:
    """An answer of a token and an event with counts."""
    return SSE_HEAD + token() + b'data: {"usage": {' + counts + b"}}\n\ndata: [DONE]\n\n"


def failure_of(answer: Answer, **settings: Any) -> Failure:
    with fake_server(answer=answer) as fake:
        (record,) = run(fake.url, requests(1), **settings).records
    assert record.failure is not None
    assert record.end_s is not None
    return record.failure


def test_a_chat_begins_without_a_token() -> None:
    def delta(finish_reason: str | None = None, **fields: str) -> bytes:
        return event({"choices": [{"delta": fields, "finish_reason": finish_reason}]})

    opening = delta(role="assistant", content="")
    tokens = delta(reasoning_content="hm") + delta(content="a") + delta(content="")
    answer = fixed(SSE_HEAD + opening + tokens + delta("stop") + b"data: [DONE]\n\n")
    with fake_server(answer=answer) as fake:
        (record,) = run(fake.url, requests(1), api="chat").records
    assert record.failure is None
    assert len(record.token_s) == 3


@pytest.mark.parametrize(("count", "num_tokens"), [(1, 1), (2, 2), (3, 3), (9, 1)])
def test_events_without_text_are_tokens_if_the_count_says_so(count: int, num_tokens: int) -> None:
    def delta(finish_reason: str | None = None, **fields: str) -> bytes:
        return event({"choices": [{"delta": fields, "finish_reason": finish_reason}]})

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + delta(role="assistant", content="") + delta(content="a"))
        writer.write(delta("stop", content="") + usage(asked, count))

    with fake_server(answer=answer) as fake:
        (record,) = run(fake.url, requests(1), api="chat").records
    assert len(record.token_s) == num_tokens


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (response(429, b'{"error": {"message": "full"}}', "Retry-After: 7"), "refused", "After: 7"),
        (response(429, b""), "refused", "not given"),
        (response(503, b"", "Retry-After: 5"), "unavailable", "After: 5"),
        (response(400, b'{"error": {"message": "no such field"}}'), "rejected", "no such field"),
        (response(422, b'{"detail": [{"msg": "bad"}]}'), "rejected", "bad"),
        (response(502, b"<h1>Bad\nGateway</h1>"), "rejected", "502: <h1>Bad Gateway"),
        (response(307, b"", "Location: /x"), "rejected", "status 307: no message"),
        (response(200, b'{"choices": [{"text": "a"}]}'), "not_streaming", "one JSON object"),
        (response(200, b'{"error": "out of memory"}'), "rejected", "out of memory"),
        (response(200, b"<p>hello</p>", kind="text/html"), "garbage", "text/html"),
        (SSE_HEAD + b"data: {not json\n\n", "garbage", "{not json"),
        (SSE_HEAD + b"data: [1, 2]\n\n", "garbage", "[1, 2]"),
        (SSE_HEAD + b'data: {"choices": 5}\n\n', "garbage", "5"),
        (SSE_HEAD + b'data: {"usage": {"prompt_tokens": "many"}}\n\n', "garbage", "many"),
        (told(b'"completion_tokens": 1e400'), "garbage", "1e400"),
        (told(b'"prompt_tokens": -1'), "garbage", "-1"),
        (told(b'"completion_tokens": 1' + b"0" * 30), "garbage", "10000"),
        (told(b'"scheduling_delay_ms": NaN'), "garbage", "NaN"),
        (told(b'"scheduling_delay_ms": Infinity'), "garbage", "Infinity"),
        (told(b'"scheduling_delay_ms": -0.5'), "garbage", "-0.5"),
        (SSE_HEAD + b"data: " + NESTED + b"\n\n", "garbage", "[[["),
        (response(500, NESTED), "rejected", "500: [[["),
        (response(200, NESTED), "not_streaming", "one JSON object"),
        (SSE_HEAD + b"data: [DONE]\n\n", "garbage", "the answer holds no token"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "garbage", "RemoteProtocolError"),
        (SSE_HEAD + token() * 2, "broken", "after 2 tokens"),
        (SSE_HEAD, "broken", "after 0 tokens"),
        (b"", "broken", "disconnected"),
        (SSE_HEAD.replace(b"connection: close", b"content-length: 999") + token(), "broken", ""),
        (SSE_HEAD + event({"error": {"message": "it failed"}}), "broken", "it failed"),
        (SSE_HEAD + event({"error": {"message": "\ud800 failed"}}), "broken", "? failed"),
    ],
)
def test_what_goes_wrong_is_told_apart(data: bytes, kind: str, words: str) -> None:
    failure = failure_of(fixed(data))
    assert failure.kind == kind
    assert words in failure.message
    assert "\n" not in failure.message


@pytest.mark.parametrize("end", [b"", b"data: [DONE]\n\n"])
def test_a_finish_reason_or_done_ends_an_answer(end: bytes) -> None:
    tokens = token() + token(finish_reason=None if end else "stop")
    with fake_server(answer=fixed(SSE_HEAD + tokens + end)) as fake:
        (record,) = run(fake.url, requests(1)).records
    assert record.failure is None
    assert len(record.token_s) == 2


def test_an_answer_of_no_token_is_one_if_none_was_asked_for() -> None:
    with fake_server(answer=fixed(SSE_HEAD + b"data: [DONE]\n\n")) as fake:
        (record,) = run(fake.url, requests(1, output_tokens=0)).records
    assert record.failure is None


def test_whatever_a_request_leads_to_is_its_own_failure() -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise LookupError("not known")

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(fail)) as http:
            await exchange(http, Endpoint("http://host"), b"{}", record, lambda: 1.0)

    record = Record(Arrival(0.0, 25, 3))
    asyncio.run(ask())
    assert record.failure == Failure("garbage", "LookupError: not known")
    assert record.end_s == 1.0


def test_what_comes_after_the_end_is_not_waited_for() -> None:
    async def open_ended(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await answer_in_full(asked, writer)
        await asyncio.sleep(30)

    async def cut_off(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD.replace(b"connection: close", b"content-length: 9999"))
        writer.write(token() * 3 + usage(asked, 3))

    for answer in (open_ended, cut_off):
        with fake_server(answer=answer) as fake:
            (record,) = run(fake.url, requests(1)).records
        assert record.failure is None
        assert len(record.token_s) == 3


def test_a_connection_is_used_again() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        body = token() * 3 + usage(asked, 3)
        head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: "
        writer.write(f"{head}{len(body) + 1}\r\n\r\n".encode() + body)
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(b"\n")

    with fake_server(answer=answer, keeps_alive=True) as fake:
        results = run(fake.url, Workload(requests(6).arrivals, clients=1))
        assert fake.num_connections == 4  # one for each request that found out about the server
    assert summarize(results).num_answered == 6


def test_a_slow_answer_runs_out_of_time() -> None:
    async def slow(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + token())
        await asyncio.sleep(30)

    failure = failure_of(slow, timeout_s=0.1)
    assert failure == Failure("timeout", "no end after 0.1 s")


def test_a_connection_that_is_reset_is_broken() -> None:
    async def reset(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + token())
        await writer.drain()
        linger = b"\1\0\0\0\0\0\0\0"  # on, 0 s: closing resets
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    assert failure_of(reset).kind == "broken"

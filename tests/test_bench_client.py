"""The load generator against real local servers: good ones, and those that fail in every way."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import (
    MODEL,
    SSE_HEAD,
    Answer,
    Asked,
    answer_in_full,
    event,
    fake_server,
    fixed,
    response,
    token,
    usage,
)
from server_fixtures import RunningServer, serve, tiny_engine

from stallfree.bench.client import GONE, INTERRUPTED, run_workload
from stallfree.bench.endpoint import Endpoint, prepare
from stallfree.bench.metrics import Slo, summarize
from stallfree.bench.progress import Progress
from stallfree.bench.prompts import OWN_WORDS, Prompts, PromptSize
from stallfree.bench.records import Failure, Results
from stallfree.bench.report import count_table, notes, planned_and_counted
from stallfree.bench.workload import Arrival, Workload
from stallfree.errors import ConfigError, EndpointError


def requests(count: int, gap_s: float = 0.0, output_tokens: int = 3) -> Workload:
    arrivals = [Arrival(index * gap_s, 25, output_tokens) for index in range(count)]
    return Workload(tuple(arrivals))


def run(url: str, workload: Workload, **settings: Any) -> Results:
    return asyncio.run(run_workload(Endpoint(url, **settings), workload))


def failure_of(answer: Answer, **settings: Any) -> Failure:
    with fake_server(answer=answer) as fake:
        (record,) = run(fake.url, requests(1), **settings).records
    assert record.failure is not None
    assert record.end_s is not None
    return record.failure


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serve(tiny_engine(tmp_path_factory.mktemp("bench"))) as running:
        yield running


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("clients", [None, 2])
def test_our_own_server(server: RunningServer, api: str, clients: int | None) -> None:
    arrivals = tuple(Arrival(0.01 * index, 150, 8) for index in range(5))
    results = run(f"{server.url}/v1", Workload(arrivals, clients), api=api)
    assert results.is_complete
    assert len(results.records) == 5
    for record in results.records:
        assert record.failure is None
        assert record.output_tokens == len(record.token_s) == 8
        assert record.token_s == sorted(record.token_s)
        assert record.end_s is not None
        assert record.scheduled_s is not None
        assert record.sent_s < record.scheduled_s < record.token_s[0] <= record.end_s
        assert clients is not None or record.sent_s >= record.arrival.at_s
    planned, counted = planned_and_counted(results.records, "prompt")
    assert counted == pytest.approx(planned, rel=0.08)
    summary = summarize(results, Slo(tbt_s=60, ttft_s=60))
    assert (summary.num_answered, summary.num_good) == (5, 5)
    assert summary.latencies["scheduling_delay"]["max"] > 0


def test_our_own_server_refuses_what_does_not_fit(server: RunningServer) -> None:
    (record,) = run(server.url, Workload((Arrival(0.0, 25, 5000),))).records
    assert record.failure is not None
    assert record.failure.kind == "rejected"
    assert "context" in record.failure.message


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not to be used
    with fake_server() as fake:
        results = run(
            fake.url + "/v1/",
            requests(2),
            api_key="secret",
            extra_body={"ignore_eos": None, "top_k": 5},
            headers={"X-Own": "1"},
        )
    assert [each.path for each in fake.asked] == ["/v1/models", *["/v1/completions"] * 4]
    for asked in fake.asked:
        assert asked.headers["authorization"] == "Bearer secret"
        assert asked.headers["x-own"] == "1"
    prompt = fake.streamed[0].body.pop("prompt")
    assert fake.streamed[0].body == {
        "model": MODEL,
        "max_tokens": 3,
        "temperature": 0,
        "top_k": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert len(prompt.split()) == 10  # 5 + 2 * 10 tokens
    assert "secret" not in json.dumps(results.facts)
    assert results.facts["endpoint"] == fake.url
    assert results.records[0].prompt_tokens == 25


def test_a_named_model_and_a_chat_need_no_list_of_models() -> None:
    with fake_server(models=response(404, b"{}")) as fake:
        results = run(fake.url, requests(1), model="own", api="chat")
        assert results.records[0].failure is None
        with pytest.raises(EndpointError, match=r"status 404"):
            run(fake.url, requests(1))
    (asked,) = fake.streamed
    assert (asked.path, asked.body["model"]) == ("/v1/chat/completions", "own")
    assert asked.body["messages"][0]["role"] == "user"


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


def test_an_open_loop_does_not_wait_for_answers() -> None:
    async def after_all(asked: Asked, writer: asyncio.StreamWriter) -> None:
        while len(fake.streamed) < 6:
            await asyncio.sleep(0.005)
        await answer_in_full(asked, writer)

    with fake_server(answer=after_all) as fake:
        results = run(fake.url, requests(6, gap_s=0.005))
    assert summarize(results).num_answered == 6


def test_clients_wait_for_their_answers() -> None:
    most = 0

    async def counting(asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal most
        under_way.add(id(writer))
        most = max(most, len(under_way))
        await asyncio.sleep(0.01)
        await answer_in_full(asked, writer)
        under_way.discard(id(writer))

    under_way: set[int] = set()
    with fake_server(answer=counting) as fake:
        results = run(fake.url, Workload(requests(7).arrivals, clients=3))
    assert most == 3
    assert summarize(results).num_answered == 7
    texts = [asked.text for asked in fake.streamed]
    assert len(set(texts)) == 7


def test_a_refused_client_waits_as_long_as_it_is_told() -> None:
    refusal = fixed(response(429, b'{"error": {"message": "full"}}', "Retry-After: 1"))
    with fake_server(answer=refusal, later=answer_in_full) as fake:
        results = run(fake.url, Workload(requests(2).arrivals, clients=1))
    first, second = results.records
    assert first.failure == Failure("refused", "status 429: full (Retry-After: 1)")
    assert second.failure is None
    assert first.end_s is not None
    assert second.sent_s - first.end_s >= 1


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (response(429, b'{"error": {"message": "full"}}', "Retry-After: 7"), "refused", "After: 7"),
        (response(429, b""), "refused", "not given"),
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
        (SSE_HEAD + b'data: {"usage": {"prompt_tokens": 1e400}}\n\n', "garbage", "1e400"),
        (SSE_HEAD + b'data: {"usage": {"scheduling_delay_ms": NaN}}\n\n', "garbage", "NaN"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "garbage", "RemoteProtocolError"),
        (SSE_HEAD + token() * 2, "broken", "after 2 tokens"),
        (SSE_HEAD, "broken", "after 0 tokens"),
        (b"", "broken", "disconnected"),
        (SSE_HEAD.replace(b"connection: close", b"content-length: 999") + token(), "broken", ""),
        (SSE_HEAD + event({"error": {"message": "it failed"}}), "broken", "it failed"),
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


def test_one_failure_stops_nobody_else() -> None:
    with fake_server(answer=fixed(SSE_HEAD + b"data: ?\n\n"), later=answer_in_full) as fake:
        results = run(fake.url, requests(5, gap_s=0.002))
    kinds = [each.failure and each.failure.kind for each in results.records]
    assert kinds.count("garbage") == 1
    assert kinds.count(None) == 4
    summary = summarize(results)
    assert summary.failures == {"garbage": 1}
    assert any("1 requests failed as 'garbage'" in note for note in notes(results, summary))


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def test_a_server_that_is_down_is_named_at_once() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    for model in (None, "named"):
        with pytest.raises(EndpointError, match=f"{url}.* cannot be reached"):
            run(url, requests(1), model=model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"models": response(200, b"[]")}, "no JSON object"),
        ({"models": response(200, b'{"data": []}')}, "--model"),
        ({"models": response(200, b'{"data": [{}]}')}, "--model"),
        ({"models": response(401, b'{"error": "no key"}')}, "status 401: no key"),
        ({"probe": response(400, b'{"error": "extra: ignore_eos"}')}, "'{\"ignore_eos\": null}'"),
        ({"probe": response(200, b"hello")}, "no JSON object"),
    ],
)
def test_a_server_that_cannot_be_measured_is_refused(settings: dict[str, Any], words: str) -> None:
    with fake_server(**settings) as fake, pytest.raises(EndpointError) as caught:
        run(fake.url, requests(1))
    assert words in str(caught.value)
    assert fake.url in str(caught.value)


@pytest.mark.parametrize("url", ["", "ftp://host", "http://", "http://host:port", "http://h?q=1"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:8000"):
        Endpoint(url)


@pytest.mark.parametrize("url", ["host:1", "http://host:1/", "http://host:1/v1", "host:1/v1/"])
def test_a_url_may_be_written_in_several_ways(url: str) -> None:
    assert Endpoint(url).requests_url == "http://host:1/v1/completions"


def test_a_server_without_counts_has_a_token_for_a_word() -> None:
    with fake_server(probe=response(200, b'{"choices": []}')) as fake:
        size = asyncio.run(prepare(Endpoint(fake.url))).size
    assert size == PromptSize(1.0, 0.0, is_measured=False)


@pytest.mark.parametrize(
    ("about", "length"),
    [
        ({"max_model_len": 4096}, 4096),
        ({"meta": {"n_ctx": 2816, "n_ctx_train": 32768}}, 2816),
        ({"max_model_len": "long", "meta": None}, None),
        ({}, None),
    ],
)
def test_the_context_is_found_as_servers_tell_it(about: dict[str, Any], length: int | None) -> None:
    data = [{"id": "another", "max_model_len": 7}, {"id": "own", **about}]
    models = response(200, json.dumps({"data": data}).encode())
    with fake_server(models=models) as fake:
        ready = asyncio.run(prepare(Endpoint(fake.url, model="own")))
    assert (ready.model, ready.max_model_len) == ("own", length)


def test_a_server_that_dies_ends_the_run() -> None:
    async def last_answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await answer_in_full(asked, writer)
        fake.close()

    with fake_server(answer=last_answer) as fake:
        results = run(fake.url, requests(500, gap_s=0.01))
    assert not results.is_complete
    assert results.facts["ended_early"] == GONE
    assert results.records[0].failure is None
    assert 10 <= summarize(results).failures["unreachable"] <= 20
    assert GONE in notes(results, summarize(results))[0]
    assert ("requests sent", f"{len(results.records)} of 500 planned") in count_table(results).rows


def test_an_interrupted_run_keeps_what_it_has() -> None:
    async def endless(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + token())
        await asyncio.sleep(30)

    async def interrupted(url: str) -> Results:
        stop = asyncio.Event()

        def on_progress(progress: Progress) -> None:
            told.append(progress)
            if progress.num_tokens:
                stop.set()

        return await run_workload(Endpoint(url), workload, on_progress, stop=stop)

    told: list[Progress] = []
    workload = requests(1000, gap_s=0.1)
    with fake_server(answer=endless) as fake:
        results = asyncio.run(interrupted(fake.url))
    assert not results.is_complete
    assert results.facts["ended_early"] == INTERRUPTED
    assert 1 <= len(results.records) < 1000
    assert results.records[0].token_s
    assert results.records[0].end_s is None
    assert (told[0].num_sent, told[-1].num_in_flight) == (0, len(results.records))


def test_several_tokens_in_an_event_are_noted() -> None:
    async def in_pairs(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + token(" a b") * 3 + usage(asked, 6))

    with fake_server(answer=in_pairs) as fake:
        results = run(fake.url, requests(1, output_tokens=6))
    (note,) = notes(results, summarize(results))
    assert "2.00 tokens" in note


def test_prompts_are_unlike_unless_they_share_a_prefix() -> None:
    prompts = Prompts(PromptSize(2.0, 5.0, is_measured=True), salt=1)
    alone = [prompts.text(number, Arrival(0, 205, 1)) for number in range(3)]
    assert {len(text.split()) for text in alone} == {100}
    assert len({" ".join(text.split()[:4]) for text in alone}) == 3
    turns = [prompts.text(number, Arrival(0, size, 1, 7)) for number, size in enumerate((205, 405))]
    first, second = (turn.split() for turn in turns)
    assert (len(first), len(second)) == (100, 200)
    assert first[:-OWN_WORDS] == second[: len(first) - OWN_WORDS]
    assert first[-OWN_WORDS:] != second[len(first) - OWN_WORDS : len(first)]
    assert prompts.text(0, Arrival(0, 1, 1)) != ""
    assert Prompts(PromptSize(), 1).text(0, turns_of(1)) != Prompts(PromptSize(), 2).text(
        0, turns_of(1)
    )


def turns_of(prefix_id: int) -> Arrival:
    return Arrival(0, 50, 1, prefix_id)


def test_prompts_are_measured_on_a_small_context(tmp_path: Path) -> None:
    with serve(tiny_engine(tmp_path, max_model_len=512)) as small:
        ready = asyncio.run(prepare(Endpoint(small.url)))
    assert ready.max_model_len == 512
    assert ready.size is not None
    assert ready.size.is_measured

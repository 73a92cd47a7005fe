"""The load generator against real local servers: how it sends, and how a run ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_server import (
    SSE_HEAD,
    Asked,
    answer_in_full,
    fake_server,
    fixed,
    requests,
    response,
    run,
    token,
    usage,
)
from server_fixtures import RunningServer, serve, tiny_engine

from stallfree.bench.client import GONE, INTERRUPTED, run_workload
from stallfree.bench.endpoint import Endpoint
from stallfree.bench.files import write_csv, write_json
from stallfree.bench.metrics import Slo, summarize
from stallfree.bench.progress import Progress
from stallfree.bench.records import Failure, Results
from stallfree.bench.report import count_table, notes, planned_and_counted
from stallfree.bench.workload import Arrival, Workload


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


def test_there_are_no_more_clients_than_requests() -> None:
    async def watched(url: str) -> Results:
        def on_progress(progress: Progress) -> None:
            num_tasks.append(len(asyncio.all_tasks()))

        workload = Workload(requests(3).arrivals, clients=100_000)
        return await run_workload(Endpoint(url), workload, on_progress)

    num_tasks: list[int] = []
    with fake_server() as fake:
        results = asyncio.run(watched(fake.url))
    assert summarize(results).num_answered == 3
    assert max(num_tasks) < 20


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
    "data",
    [
        b"?",
        b'{"usage": {"completion_tokens": 1e400}}',
        b'{"usage": {"scheduling_delay_ms": NaN}}',
        b'{"choices": ' + b"[" * 100_000,
    ],
)
def test_one_failure_stops_nobody_else(data: bytes, tmp_path: Path) -> None:
    answer = fixed(SSE_HEAD + b"data: " + data + b"\n\n")
    with fake_server(answer=answer, later=answer_in_full) as fake:
        results = run(fake.url, requests(5, gap_s=0.002))
    kinds = [each.failure and each.failure.kind for each in results.records]
    assert kinds.count("garbage") == 1
    assert kinds.count(None) == 4
    summary = summarize(results)
    assert summary.failures == {"garbage": 1}
    assert any("1 requests failed as 'garbage'" in note for note in notes(results, summary))
    write_json(tmp_path / "run.json", results)
    write_csv(tmp_path / "run.csv", results)


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


async def endless(asked: Asked, writer: asyncio.StreamWriter) -> None:
    writer.write(SSE_HEAD + token())
    await asyncio.sleep(30)


def run_until(
    ends: Callable[[Progress], bool], url: str, workload: Workload
) -> tuple[Results, list[Progress]]:
    """Interrupt a run at some progress; what it gives, and all that it told."""
    told: list[Progress] = []

    async def interrupted() -> Results:
        stop = asyncio.Event()

        def on_progress(progress: Progress) -> None:
            told.append(progress)
            if ends(progress):
                stop.set()

        return await run_workload(Endpoint(url, timeout_s=10), workload, on_progress, stop=stop)

    return asyncio.run(interrupted()), told


def test_an_interrupted_run_keeps_what_it_has() -> None:
    with fake_server(answer=endless) as fake:
        results, told = run_until(
            lambda progress: progress.num_tokens > 0, fake.url, requests(1000, gap_s=0.1)
        )
    assert not results.is_complete
    assert results.facts["ended_early"] == INTERRUPTED
    assert 1 <= len(results.records) < 1000
    assert results.records[0].token_s
    assert results.records[0].end_s is None
    assert (told[0].num_sent, told[-1].num_in_flight) == (0, len(results.records))


def test_progress_counts_tokens_of_answers_that_ended_or_did_not() -> None:
    with fake_server(answer=answer_in_full, later=endless) as fake:
        results, told = run_until(
            lambda progress: progress.num_answered > 0 and progress.num_tokens == 4,
            fake.url,
            requests(2),
        )
    assert sorted(len(record.token_s) for record in results.records) == [1, 3]
    assert told[-1].num_tokens == 4


def test_several_tokens_in_an_event_are_noted() -> None:
    async def in_pairs(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + token(" a b") * 3 + usage(asked, 6))

    with fake_server(answer=in_pairs) as fake:
        results = run(fake.url, requests(1, output_tokens=6))
    (note,) = notes(results, summarize(results))
    assert "2.00 tokens" in note

"""What is told of several replicas: metrics of each, and one trace of all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import GREEDY, tiny_settings
from prometheus_client.parser import text_string_to_metric_families
from replica_fixtures import ThreadFleet, ask, make_front, running
from server_fixtures import RunningServer, serve, tiny_engine, wait_until

from stallfree.core.budget import Squeezed
from stallfree.engine.settings import EngineSettings
from stallfree.engine.trace_recorder import ITERATIONS, REQUESTS, TraceRecorder
from stallfree.replicas.front import ReplicatedEngine
from stallfree.replicas.messages import Events, Hello, Measure, Ready, Report
from stallfree.replicas.wire import connect

BODY = {"model": "tiny", "prompt": list(range(5, 25)), "max_tokens": 4, "ignore_eos": True}
OF_PROCESS = ("stallfree_http_requests", "process_")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return tiny_settings(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def fleet(settings: EngineSettings) -> ThreadFleet:
    return ThreadFleet(settings)


@pytest.fixture(scope="module")
def server(fleet: ThreadFleet) -> Iterator[RunningServer]:
    with serve(make_front(fleet), served_model_name="tiny") as running:
        yield running


def scrape(server: RunningServer) -> Samples:
    """All samples, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(server.http.get("/metrics").text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples["stallfree_" + name, tuple(sorted(labels.items()))]


def labels_of(samples: Samples) -> dict[str, set[str]]:
    """The names of the labels of each sample that has to do with an engine."""
    found: dict[str, set[str]] = {}
    for name, labels in samples:
        if not name.startswith(OF_PROCESS):
            found.setdefault(name, set()).update(dict(labels))
    return found


def test_each_replica_shows_what_one_engine_shows(
    server: RunningServer, fleet: ThreadFleet, tmp_path: Path
) -> None:
    for _ in range(4):
        assert server.post("/v1/completions", BODY).status_code == 200
    wait_until(server.is_idle)
    samples = scrape(server)
    given = [value(samples, "tokens_total", kind="output", replica=r) for r in "01"]
    assert given == [4 * count for count in fleet.served]
    assert sum(given) == 16
    counts = [
        value(samples, "time_to_first_token_seconds_count", tier="default", replica=r) for r in "01"
    ]
    assert counts == fleet.served
    ends = [
        value(samples, "requests_ended_total", tier="default", reason="length", replica=r)
        for r in "01"
    ]
    assert ends == fleet.served
    assert all(value(samples, "replica_ready", replica=r) == 1 for r in "01")
    with serve(tiny_engine(tmp_path, token_budget=16, dtype="float32")) as one:
        body = {**BODY, "model": one.http.get("/v1/models").json()["data"][0]["id"]}
        assert one.post("/v1/completions", body).status_code == 200
        wait_until(one.is_idle)
        of_one = labels_of(scrape(one))
    of_several = labels_of(samples)
    own = {name: labels for name, labels in of_several.items() if "_replica_" not in name}
    assert own == {name: labels | {"replica"} for name, labels in of_one.items()}
    places = {dict(labels).get("replica") for name, labels in samples}
    assert places == {"0", "1", None}


def test_whoever_replaces_a_replica_has_its_label_and_counts_from_zero(
    settings: EngineSettings,
) -> None:
    fleet = ThreadFleet(settings, count=1)
    with serve(make_front(fleet), served_model_name="tiny") as server:
        assert server.post("/v1/completions", BODY).status_code == 200
        assert value(scrape(server), "tokens_total", kind="output", replica="0") == 4
        fleet.replicas[0].end()
        wait_until(lambda: server.http.get("/health").status_code == 503)
        assert not any(dict(labels).get("replica") for _, labels in scrape(server))
        fleet.add()
        wait_until(lambda: server.http.get("/health").status_code == 200)
        assert value(scrape(server), "tokens_total", kind="output", replica="0") == 0


async def until_ready(front: ReplicatedEngine, count: int) -> None:
    while front.health["ready_replicas"] != count:
        await asyncio.sleep(0.01)


def test_a_replica_that_says_nothing_holds_up_nobody(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stallfree.replicas.trace._SILENT_S", 0.5)
    fleet = ThreadFleet(settings)

    async def main() -> None:
        async with running(fleet, timeout_s=30) as front:
            await ask(front, "one", [1, 2, 3], GREEDY)
            offer, last = fleet.replicas[0].outlook.now()
            await asyncio.to_thread(fleet.replicas[0].end)
            await until_ready(front, 1)
            with connect(fleet.place) as mute:
                report = Report(offer, last, 0, 0, Squeezed())
                for said in (Hello("nowhere", 1), Ready(front.facts), Events((), report, 0.0)):
                    mute.send(said)
                await until_ready(front, 2)
                assert set(await front.readings()) == {"1"}  # it never said anything
                trace = front.trace()
                trace.stop()
                pids = {event["pid"] async for some in trace.events() for event in some}
                assert pids == {2 + ITERATIONS, 2 + REQUESTS}
                assert trace.is_cut
                trace, reading = front.trace(), asyncio.create_task(front.readings())
                await asyncio.sleep(0)  # both are asked, and one is lost before it says anything
            assert set(await reading) == {"1"}
            await until_ready(front, 1)
            trace.stop()
            assert {event["pid"] async for some in trace.events() for event in some} == pids
            assert trace.is_cut

    asyncio.run(main())


def test_a_reading_is_kept_while_a_replica_is_silent(settings: EngineSettings) -> None:
    fleet = ThreadFleet(settings, count=1)

    async def main() -> None:
        async with running(fleet, timeout_s=30) as front:
            before = (await front.readings())["0"]
            replica, held = fleet.replicas[0], list[Any]()
            take = replica._take

            def drop(message: Any) -> None:
                held.append(message) if message == Measure() else take(message)

            replica._take = drop  # type: ignore[method-assign]
            assert (await front.readings())["0"] is before
            replica._take = take  # type: ignore[method-assign]
            for said in held:
                take(said)
            assert (await front.readings())["0"] is not before

    asyncio.run(main())


def recorders(fleet: ThreadFleet) -> list[TraceRecorder]:
    return [
        observer
        for replica in fleet.replicas
        for observer in replica.engine.engine.observers._observers
        if isinstance(observer, TraceRecorder)
    ]


def test_one_trace_shows_all_replicas(server: RunningServer, fleet: ThreadFleet) -> None:
    traces: list[dict[str, Any]] = []

    def record() -> None:
        response = server.http.post("/debug/trace", params={"seconds": "1"})
        assert response.status_code == 200, response.text
        traces.append(response.json())

    before = list(fleet.served)
    thread = threading.Thread(target=record)
    started_us = server.engine.now() * 1e6
    thread.start()
    wait_until(lambda: all(each.is_recording for each in recorders(fleet)))
    assert server.http.post("/debug/trace").status_code == 409
    ids = {server.post("/v1/completions", BODY).json()["id"] for _ in range(4)}
    thread.join()
    ended_us = server.engine.now() * 1e6
    assert not any(each.is_recording for each in recorders(fleet))
    assert traces[0]["otherData"] == {"is_cut": False}
    events = traces[0]["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {
        0: "replica 0: iterations",
        1: "replica 0: requests",
        2: "replica 1: iterations",
        3: "replica 1: requests",
    }
    rows = {
        (e["pid"], name)
        for e in events
        if e["name"] == "thread_name"
        for name in ids
        if name in e["args"]["name"]
    }
    assert {name for _, name in rows} == ids
    served = [now - then for now, then in zip(fleet.served, before, strict=True)]
    groups = [pid for pid, _ in rows]
    assert [groups.count(2 * r + REQUESTS) for r in (0, 1)] == served
    bars = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in bars} >= {2 * r + ITERATIONS for r in (0, 1) if served[r]}
    assert all(started_us - 1e4 <= e["ts"] <= ended_us + 1e4 for e in bars)

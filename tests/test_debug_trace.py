"""`POST /debug/trace` and what is recorded for it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from engine_fixtures import GREEDY, tiny_settings
from server_fixtures import MODEL, RunningServer, serve, tiny_engine, wait_until

from stallfree.core.targets import Targets
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.trace_recorder import ITERATIONS, REQUESTS, Recording, TraceRecorder

PATH = "/debug/trace"
Event = dict[str, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serve(tiny_engine(tmp_path_factory.mktemp("trace"), max_num_seqs=1)) as running:
        yield running


@pytest.fixture
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    settings = tiny_settings(tmp_path_factory.mktemp("model"))
    return build_engine(settings, show_progress=False)


def recorder_of(engine: Engine) -> TraceRecorder:
    recorder = TraceRecorder()
    engine.observers.add(recorder)
    return recorder


def bars(events: list[Event], group: int) -> list[Event]:
    return [each for each in events if each["ph"] == "X" and each["pid"] == group]


def rows(events: list[Event]) -> dict[str, list[Event]]:
    """The bars of each request, by its id."""
    names = {
        each["tid"]: each["args"]["name"].partition(":")[0]
        for each in events
        if each["name"] == "thread_name"
    }
    found: dict[str, list[Event]] = {name: [] for name in names.values()}
    for each in bars(events, REQUESTS):
        found[names[each["tid"]]].append(each)
    return found


def events_of(recording: Recording, engine: Engine) -> list[Event]:
    return list(recording.events(engine.clock.now()))


def phases(row: list[Event]) -> list[str]:
    """The names of a row's bars in order; none overlaps the one before."""
    ordered = sorted(row, key=lambda each: each["ts"])
    for before, after in itertools.pairwise(ordered):
        assert before["ts"] + before["dur"] <= after["ts"] + 1  # each is rounded
    return [each["name"] for each in ordered]


def test_each_iteration_and_each_phase_is_a_bar(engine: Engine) -> None:
    recorder = recorder_of(engine)
    recording = recorder.start(engine.clock.now())
    engine.add("one", [1] * 40, GREEDY, Targets("priority"))
    engine.add("two", [2] * 4, GREEDY)
    while engine.has_requests:
        engine.step()
    recorder.stop()
    engine.add("later", [1], GREEDY)
    engine.step()
    events = events_of(recording, engine)
    iterations = bars(events, ITERATIONS)
    args = [each["args"] for each in iterations]
    assert args[0]["prefill_tokens"] == args[0]["budget"] == 16
    assert (args[0]["decodes"], args[0]["predicted_ms"], args[0]["failed"]) == (0, None, False)
    assert sum(each["prefill_tokens"] for each in args) == 44
    assert sum(each["decodes"] for each in args) == 22
    for each in iterations:
        assert each["args"]["actual_ms"] == pytest.approx(each["dur"] / 1000, abs=0.002)
    requests = rows(events)
    assert set(requests) == {"one/0", "two/0"}
    for row in requests.values():
        assert phases(row) == ["waiting", "prefill", "decode"]
        assert [each["args"] for each in row if each["name"] == "decode"] == [{"ended": "length"}]


def test_a_preempted_request_waits_again(engine: Engine) -> None:
    recorder = recorder_of(engine)
    recording = recorder.start(engine.clock.now())
    engine.add("one", [1] * 4, GREEDY)
    engine.step()
    engine.step()
    engine.scheduler.recompute([])
    engine.step()
    row = rows(events_of(recording, engine))["one/0"]
    assert phases(row) == ["waiting", "prefill", "decode", "waiting", "prefill", "decode"]


def test_what_began_before_is_seen_from_the_start_of_the_recording(engine: Engine) -> None:
    recorder = recorder_of(engine)
    engine.scheduler.config = replace(engine.scheduler.config, max_num_seqs=1)
    engine.add("running", [1] * 4, GREEDY)
    engine.add("waiting", [1] * 4, GREEDY)
    engine.step()
    engine.step()
    started = engine.clock.now()
    recording = recorder.start(started)
    engine.step()
    requests = rows(events_of(recording, engine))
    assert phases(requests["running/0"]) == ["decode"]
    assert phases(requests["waiting/0"]) == ["waiting"]
    for row in requests.values():
        assert row[0]["ts"] >= round(started * 1e6)


def test_a_recording_holds_so_much_and_no_more(engine: Engine) -> None:
    recording = Recording(engine.clock.now(), max_entries=5)
    recorder = recorder_of(engine)
    recorder._recording = recording
    for name in "abc":
        engine.add(name, [1] * 4, GREEDY)
    while engine.has_requests:
        engine.step()
    events = events_of(recording, engine)
    assert recording.is_cut
    assert len(bars(events, ITERATIONS)) + len(bars(events, REQUESTS)) <= 5


def record(server: RunningServer, seconds: str = "1") -> dict[str, Any]:
    response = server.http.post(PATH, params={"seconds": seconds})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert "stallfree-trace.json" in response.headers["content-disposition"]
    trace: dict[str, Any] = response.json()
    assert trace["otherData"] == {"is_cut": False}
    return trace


def test_a_server_that_is_asked_while_it_works(server: RunningServer) -> None:
    traces: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: traces.append(record(server)))
    body = {"model": MODEL, "prompt": [5] * 20, "max_tokens": 3, "ignore_eos": True}
    recorder = recorder_in(server)
    thread.start()
    wait_until(lambda: recorder.is_recording)
    ids = {server.post("/v1/completions", {**body, "n": 2}).json()["id"] for _ in range(2)}
    thread.join()
    requests = rows(traces[0]["traceEvents"])
    assert set(requests) == {f"{each}-0/{index}" for each in ids for index in range(2)}
    assert all(phases(row)[-1] == "decode" for row in requests.values())
    assert len(bars(traces[0]["traceEvents"], ITERATIONS)) >= 6


def recorder_in(server: RunningServer) -> TraceRecorder:
    observers = server.engine.engine.observers._observers
    (found,) = [each for each in observers if isinstance(each, TraceRecorder)]
    return found


def test_a_server_that_idles_has_a_trace_too(server: RunningServer) -> None:
    events = record(server)["traceEvents"]
    assert [each["name"] for each in events] == ["process_name", "process_name"]


@pytest.mark.parametrize("seconds", ["0", "0.9", "61", "nan", "inf", "long", "", "-5", "1e9"])
def test_other_lengths_are_refused(server: RunningServer, seconds: str) -> None:
    response = server.http.post(PATH, params={"seconds": seconds})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "seconds"
    assert "from 1 to 60" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"json": {"seconds": 1}}, "there is a body, which has no meaning here"),
        ({"content": b"x", "params": {"seconds": "1"}}, "there is a body"),
        ({"content": iter([b"", b"x"])}, "there is a body"),
        ({"params": {"second": "1"}}, "there is no parameter 'second'"),
        ({"params": {"seconds": "1", "x": "y" * 99}}, "there is no parameter 'x'"),
    ],
)
def test_what_it_does_not_understand_is_refused(
    server: RunningServer, asked: dict[str, Any], said: str
) -> None:
    response = server.http.post(PATH, **asked)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert said in message
    assert "one parameter, in the address: /debug/trace?seconds=5" in message
    assert not recorder_in(server).is_recording


def test_an_empty_body_is_none(server: RunningServer) -> None:
    response = server.http.post(PATH, params={"seconds": "1"}, content=b"")
    assert response.status_code == 200


def test_what_it_takes_is_in_the_document(server: RunningServer) -> None:
    operation = server.http.get("/openapi.json").json()["paths"][PATH]["post"]
    assert [each["name"] for each in operation["parameters"]] == ["seconds"]
    assert "requestBody" not in operation
    assert {"200", "400", "409"} <= set(operation["responses"])


def test_one_at_a_time_and_none_for_who_left(server: RunningServer) -> None:
    recorder = recorder_in(server)

    def ask() -> None:
        with pytest.raises(Exception, match="timed out"):
            server.http.post(PATH, params={"seconds": "60"}, timeout=1.0)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: recorder.is_recording)
    response = server.http.post(PATH, params={"seconds": "1"})
    assert response.status_code == 409
    thread.join()
    wait_until(lambda: not recorder.is_recording)
    record(server)


def test_a_recording_ends_with_the_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    traces: list[dict[str, Any]] = []
    with serve(tiny_engine(tmp_path_factory.mktemp("ends"))) as running:
        thread = threading.Thread(target=lambda: traces.append(record(running, "60")))
        thread.start()
        recorder = recorder_in(running)
        wait_until(lambda: recorder.is_recording)
        running.server.shut_down()
        thread.join()
    assert traces  # the client does not wait for half of that time

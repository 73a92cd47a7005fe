"""The id of a request and the line of its end: in headers, in the log, and never its text."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from engine_fixtures import Failing
from server_fixtures import MODEL, RunningServer, events, serve, tiny_engine, wait_until

from stallfree.engine.observability_settings import ObservabilitySettings
from stallfree.server.request_log import JsonFormatter, TextFormatter, configure_logging

SECRET = "Würde brown fox"
BODY: dict[str, Any] = {"model": MODEL, "prompt": SECRET, "max_tokens": 4, "ignore_eos": True}
HEADER = "X-Request-Id"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serve(tiny_engine(tmp_path_factory.mktemp("log"))) as running:
        yield running


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Everything that is logged, down to debugging."""
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "stallfree"):
        yield caplog


def lines(log: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of the requests that ended."""
    return [vars(each)["fields"] for each in list(log.records) if each.name == "stallfree.request"]


def line(log: pytest.LogCaptureFixture, request_id: str) -> dict[str, Any]:
    """Of one request, which has one line."""

    def found() -> list[dict[str, Any]]:
        return [each for each in lines(log) if each["request_id"] == request_id]

    wait_until(lambda: bool(found()))
    (only,) = found()
    return only


def test_a_request_has_a_line_with_its_id(
    server: RunningServer, log: pytest.LogCaptureFixture
) -> None:
    response = server.post("/v1/completions", {**BODY, "n": 2, "service_tier": "flex"})
    fields = line(log, response.headers[HEADER])
    answer = response.json()
    assert re.fullmatch(r"[0-9a-f]{32}", fields["request_id"])
    assert fields["completion_id"] == answer["id"]
    assert fields["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert (fields["output_tokens"], fields["tier"], fields["status"]) == (8, "flex", 200)
    assert (fields["endpoint"], fields["reason"]) == ("/v1/completions", "length")
    assert 0 < fields["ttft_ms"] <= fields["duration_ms"]
    assert 0 < fields["longest_gap_ms"] <= fields["duration_ms"]


def test_a_stream_and_a_chat_have_theirs(
    server: RunningServer, log: pytest.LogCaptureFixture
) -> None:
    body = {**BODY, "stream": True, "messages": [{"role": "user", "content": SECRET}]}
    del body["prompt"]
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        chunks = list(events(response.iter_lines()))
    fields = line(log, response.headers[HEADER])
    assert fields["completion_id"] == chunks[0]["id"]
    assert (fields["endpoint"], fields["output_tokens"]) == ("/v1/chat/completions", 4)


@pytest.mark.parametrize("given", ["abc-1.2:3_4", "a" * 64])
def test_a_clean_id_of_the_client_is_kept(server: RunningServer, given: str) -> None:
    for _ in range(2):  # the same one twice is nobody's problem
        response = server.http.post("/v1/completions", json=BODY, headers={HEADER: given})
        assert response.status_code == 200
        assert response.headers[HEADER] == given


@pytest.mark.parametrize("given", ["", "a b", "a" * 65, 'a"b', "ä", "a;b", "a\tb"])
def test_another_id_is_replaced(server: RunningServer, given: str) -> None:
    headers = [(HEADER.encode(), given.encode())]
    response = server.http.get("/health", headers=headers)
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers[HEADER])


def test_errors_have_an_id_too(server: RunningServer, log: pytest.LogCaptureFixture) -> None:
    expected = {
        "/v1/nothing": (404, "other"),
        "/v1/completions": (405, "/v1/completions"),
    }
    for path, (status, endpoint) in expected.items():
        response = server.http.get(path, headers={HEADER: f"id-{status}"})
        assert response.status_code == status
        assert response.headers.get_list(HEADER) == [f"id-{status}"]
        fields = line(log, f"id-{status}")
        assert (fields["status"], fields["endpoint"]) == (status, endpoint)
    response = server.post("/v1/completions", {**BODY, "temperature": -1})
    fields = line(log, response.headers[HEADER])
    assert fields["status"] == 400
    assert "reason" not in fields


def test_a_bug_has_an_id_too(
    server: RunningServer,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str | None) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(server.server._service, "check_model", broken)
    response = server.http.post("/v1/completions", json=BODY, headers={HEADER: "bug"})
    assert response.status_code == 500
    assert response.headers.get_list(HEADER) == ["bug"]
    assert line(log, "bug")["status"] == 500


def test_a_client_that_leaves_and_a_failure_are_told_apart(
    server: RunningServer, log: pytest.LogCaptureFixture
) -> None:
    long = {**BODY, "max_tokens": 1500, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=long) as response:
        next(response.iter_lines())
    fields = line(log, response.headers[HEADER])
    assert (fields["status"], fields["reason"]) == (200, "abort")
    wait_until(server.is_idle)
    engine = server.engine.engine
    failing = Failing(engine)
    failing.fails = True
    engine.executor = failing
    try:
        response = server.post("/v1/completions", BODY)
    finally:
        engine.executor = failing.executor
    fields = line(log, response.headers[HEADER])
    assert (fields["status"], fields["reason"]) == (503, "error")
    assert "ttft_ms" not in fields


def test_text_is_in_no_log(server: RunningServer, log: pytest.LogCaptureFixture) -> None:
    chat = {**BODY, "messages": [{"role": "user", "content": SECRET}]}
    del chat["prompt"]
    answers = [server.post("/v1/completions", BODY), server.post("/v1/chat/completions", chat)]
    for field, wrong in (("temperature", -1), ("prompt", {"text": SECRET}), ("stop", [1])):
        server.post("/v1/completions", {**BODY, field: wrong})
    server.http.post("/v1/completions", content=json.dumps(BODY)[:-1])
    with server.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
        list(response.iter_lines())
    said = line(log, response.headers[HEADER])
    assert not {"prompts", "outputs"} & set(said)
    logged = "".join(JsonFormatter().format(each) for each in log.records)
    written = answers[0].json()["choices"][0]["text"]
    for text in (SECRET, written):
        assert json.dumps(text)[1:-1] not in logged
        assert text not in logged


def test_text_is_logged_if_asked_for(
    tmp_path_factory: pytest.TempPathFactory, log: pytest.LogCaptureFixture
) -> None:
    with serve(tiny_engine(tmp_path_factory.mktemp("prompts")), log_prompts=True) as running:
        response = running.post("/v1/completions", {**BODY, "prompt": [SECRET, "x"]})
        texts = [choice["text"] for choice in response.json()["choices"]]
        fields = line(log, response.headers[HEADER])
        assert fields["prompts"] == [SECRET, "x"]
        assert fields["outputs"] == texts
        response = running.post("/v1/completions", {**BODY, "prompt": [5, 6, 7]})
        assert line(log, response.headers[HEADER])["prompts"] == [[5, 6, 7]]


def test_only_completions_are_logged_without_debugging(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "stallfree"):
        server.http.get("/health")
        response = server.post("/v1/completions", BODY)
        line(caplog, response.headers[HEADER])
    assert {each["endpoint"] for each in lines(caplog)} == {"/v1/completions"}


def record(**fields: object) -> logging.LogRecord:
    made = logging.LogRecord("stallfree.x", logging.INFO, "", 0, "a %s", ("b",), None)
    if fields:
        made.fields = fields
    return made


def test_a_line_of_text_is_one_line() -> None:
    written = TextFormatter().format(record(plain="a-b/c", text='x\ny "z"', number=1.5, empty=""))
    assert written.endswith(r' INFO a b plain=a-b/c text="x\ny \"z\"" number=1.5 empty=""')
    assert TextFormatter().format(record()).endswith(" INFO a b")


def test_a_line_of_json_is_an_object() -> None:
    written = json.loads(JsonFormatter().format(record(status=200)))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", written.pop("time"))
    expected = {"level": "info", "logger": "stallfree.x", "message": "a b", "status": 200}
    assert written == expected
    failed = record()
    try:
        raise ValueError("bad\nthing")
    except ValueError:
        failed.exc_info = sys.exc_info()
    formatted = JsonFormatter().format(failed)
    assert "\n" not in formatted
    assert "ValueError: bad\nthing" in json.loads(formatted)["exception"]


def test_the_settings_decide(capsys: pytest.CaptureFixture[str]) -> None:
    root, own = logging.getLogger(), logging.getLogger("stallfree")
    before = root.handlers, root.level, own.level
    root.handlers = []
    try:
        configure_logging(ObservabilitySettings(log_format="json", log_level="warning"))
        logging.getLogger("stallfree.request").info("not this")
        logging.getLogger("stallfree.request").warning("this")
        logging.getLogger("other").info("nor this")
        logging.getLogger("other").warning("and this")
    finally:
        root.handlers, root.level, own.level = before
    written = [json.loads(each) for each in capsys.readouterr().err.splitlines()]
    assert [each["message"] for each in written] == ["this", "and this"]

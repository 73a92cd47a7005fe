"""A component that raises: one request fails, or the process ends and says so; nobody hangs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_fixtures import Server, Stream, model_in, note, seconds_until, server, stop
from fault_process import POISON, WORD

BYSTANDER = "alpha beta gamma delta"
TOKENS = 600

# By fault: where the request that it strikes goes, its fields, and the status it gets.
STRUCK: dict[str, tuple[str, dict[str, Any], int]] = {
    "tokenizer.encode": ("/v1/completions", {"prompt": f"a {WORD}"}, 500),
    "tokenizer.decode": ("/v1/completions", {"prompt": [POISON, 5], "echo": True}, 500),
    "chat template": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": WORD}]},
        500,
    ),
    "admission": ("/v1/completions", {"prompt": [5, POISON]}, 500),
    "executor": ("/v1/completions", {"prompt": [5, 6, POISON, 7]}, 500),
    "memory": ("/v1/completions", {"prompt": [5, 6, POISON, 7]}, 503),
    "sampler": ("/v1/completions", {"prompt": [5, 6, 7], "seed": POISON}, 500),
    "detokenizer": ("/v1/completions", {"prompt": [5, POISON]}, 500),
}
# Errors that nobody expects: the server closes the connection, and says so, lest a client that
# sends the next request there sees a broken one.
CLOSING = ("tokenizer.encode", "tokenizer.decode", "chat template", "admission")
# By fault: nobody is struck, as it is not needed for an answer.
UNNOTICED = ("observer", "iteration file")
# By fault: nothing can go on without it.
DEADLY = ("schedule", "budget", "predictor", "learning", "completing")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("components"))


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Server]:
    iterations = model.parent / "iterations.csv"
    with server(model, "--iteration-file", str(iterations)) as own:
        yield own


@pytest.fixture(scope="module")
def expected(running: Server) -> str:
    """What the bystander's answer is without any fault."""
    return running.text(BYSTANDER, max_tokens=TOKENS)


@pytest.mark.parametrize("fault", STRUCK)
def test_a_fault_strikes_one_request_alone(running: Server, expected: str, fault: str) -> None:
    path, fields, status = STRUCK[fault]
    before = running.left()
    bystander = Stream(running, BYSTANDER, max_tokens=TOKENS)
    bystander.wait_for_events()
    running.fault(fault)
    try:
        body = {"model": running.model, "max_tokens": 8, "temperature": 0, **fields}
        answer = running.http.post(path, json=body)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text
        assert (answer.headers.get("connection") == "close") == (fault in CLOSING)
        if path == "/v1/completions" and fault != "tokenizer.encode":
            streamed = running.http.post(path, json={**body, "stream": True})
            assert "server_error" in streamed.text
            assert "secret" not in streamed.text
        assert bystander.text == expected
        healthy_s = seconds_until(running.is_healthy)
    finally:
        running.fault(None)
    running.check_nothing_left(before)
    assert f"{fault} failed" in running.log or "no memory" in running.log
    seen = f"one request: HTTP {status}, or an error event in its stream"
    note(f"an exception in: {fault}", seen=seen, healthy=healthy_s)


def test_an_event_that_cannot_be_written_ends_its_stream(running: Server, expected: str) -> None:
    before = running.left()
    bystander = Stream(running, BYSTANDER, max_tokens=TOKENS)
    bystander.wait_for_events()
    running.fault("SSE encoder")
    struck = Stream(running, f"a {WORD}", echo=True, max_tokens=600)
    last = struck.end()[-1]
    assert last["error"]["type"] == "server_error"
    assert bystander.text == expected
    running.fault(None)
    healthy_s = running.check_nothing_left(before)
    seen = "one stream: an error event at its end"
    note("an exception in: SSE encoder", seen=seen, healthy=healthy_s)


@pytest.mark.parametrize("fault", UNNOTICED)
def test_nobody_notices(running: Server, expected: str, fault: str) -> None:
    before = running.left()
    running.fault(fault)
    assert running.text(BYSTANDER, max_tokens=TOKENS) == expected
    running.fault(None)
    healthy_s = running.check_nothing_left(before)
    assert "Traceback" in running.log
    note(f"an exception in: {fault}", seen="nothing", healthy=healthy_s)


@pytest.mark.parametrize("fault", DEADLY)
def test_the_process_ends_and_says_so(model: Path, fault: str) -> None:
    with server(model) as own:
        streams = [Stream(own, BYSTANDER, max_tokens=3000) for _ in range(3)]
        for stream in streams:
            stream.wait_for_events()
        own.fault(fault)
        for stream in streams:
            assert stream.end()[-1]["error"]["type"] == "server_error"
            assert "secret" not in str(stream.events[-1])
        assert own.process.wait(30) == 1
        assert "the engine has died" in own.log
        assert f"{fault} failed" in own.log
    with server(model) as again:
        assert again.text(BYSTANDER, max_tokens=5)
        assert stop(again) == 0
    seen = "every stream: an error event; new requests: refused; the process: exit code 1"
    note(f"an exception in: {fault}", seen=seen, healthy="a restart", lost="what was running")

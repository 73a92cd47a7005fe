"""Tiers, deadlines, users and refusals over HTTP."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from openai import RateLimitError
from server_fixtures import MODEL, RunningServer, events, serve, tiny_engine, wait_until

PROMPT = list(range(5, 25))


def tiny_server(folders: pytest.TempPathFactory, **settings: Any) -> Iterator[RunningServer]:
    with serve(tiny_engine(folders.mktemp("model"), **settings)) as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """With a target that this tiny model keeps, and admission by prediction."""
    yield from tiny_server(
        tmp_path_factory,
        tbt_slo_s=0.5,
        ttft_slo_s=5.0,
        tier=("priority:tbt=300ms,ttft=2s",),
        prefill_order="edf",
        fair=True,
        admit_within_slo=2.0,
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One request runs, one waits."""
    yield from tiny_server(
        tmp_path_factory, max_num_seqs=1, max_queued_requests=1, max_queued_tokens=500
    )


@pytest.mark.parametrize(
    ("asked", "got"),
    [("priority", "priority"), ("flex", "flex"), ("auto", "default"), ("scale", "default")],
)
def test_a_response_names_its_tier(server: RunningServer, asked: str, got: str) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "service_tier": asked}
    answer = server.post("/v1/completions", body).json()
    assert answer["service_tier"] == got
    assert answer["usage"]["completion_tokens"] == 4
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert all(each["service_tier"] == got for each in events(response.iter_lines()))


def test_the_openai_client_takes_tiers(server: RunningServer) -> None:
    answer = server.openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=3,
        service_tier="flex",
        user="somebody",
        extra_body={"ttft_slo_ms": 3000},
    )
    assert answer.service_tier == "flex"


def test_flex_has_no_target_between_tokens(server: RunningServer) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "service_tier": "flex", "tbt_slo_ms": 900}
    response = server.post("/v1/completions", body)
    assert response.status_code == 400
    assert "flex wait for others" in response.json()["error"]["message"]


def test_without_a_tier_the_response_has_none(server: RunningServer) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1}
    assert "service_tier" not in server.post("/v1/completions", body).json()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("service_tier", "gold", "service_tier is 'gold'"),
        ("tbt_slo_ms", 0, "tbt_slo_ms is 0"),
        ("tbt_slo_ms", 5e-324, "tbt_slo_ms is 5e-324"),
        ("tbt_slo_ms", 299, "this server keeps 300 ms at the least"),
        ("ttft_slo_ms", -5, "ttft_slo_ms is -5"),
        ("ttft_slo_ms", "soon", "ttft_slo_ms is 'soon'"),
        ("user", 7, "user is 7"),
    ],
)
def test_wrong_targets_are_refused(
    server: RunningServer, field: str, value: object, said: str
) -> None:
    body = {"model": MODEL, "prompt": PROMPT, field: value}
    response = server.post("/v1/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert said in response.json()["error"]["message"]


def test_what_was_predicted_and_what_came_is_logged(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2, "ttft_slo_ms": 9000}
    with caplog.at_level(logging.INFO, "stallfree.first_token"):
        assert server.post("/v1/completions", body).status_code == 200
    assert "predicted after" in caplog.text
    assert "came after" in caplog.text


def test_a_first_token_that_no_server_brings_in_time_is_a_bad_request(
    server: RunningServer,
) -> None:
    """Not "try again": it would be refused for ever. Before a stream begins, too."""
    body = {"model": MODEL, "prompt": PROMPT * 100, "max_tokens": 2, "ttft_slo_ms": 1}
    for stream in (False, True):
        response = server.post("/v1/completions", {**body, "stream": stream})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "ttft_slo_ms"
    assert server.is_idle()


def test_without_a_target_of_the_server_a_request_can_have_none(small: RunningServer) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "tbt_slo_ms": 100}
    response = small.post("/v1/completions", body)
    assert response.status_code == 400
    assert "--tbt-slo" in response.json()["error"]["message"]


def test_a_full_queue_refuses_and_hurts_nobody(small: RunningServer) -> None:
    long = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True}
    got: list[int] = []

    def run(body: dict[str, object]) -> None:
        with small.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            got.append(sum(1 for _ in events(answer.iter_lines())))

    first = threading.Thread(target=run, args=(long,))
    first.start()
    wait_until(lambda: small.engine.num_running == 1)
    second = threading.Thread(target=run, args=({**long, "max_tokens": 5},))
    second.start()
    wait_until(lambda: small.engine.num_waiting == 1)
    for stream in (False, True):
        response = small.post("/v1/completions", {**long, "stream": stream})
        assert response.status_code == 429
        assert response.headers["Retry-After"] == "5"
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert "1 requests wait" in json.dumps(response.json())
    with pytest.raises(RateLimitError):
        small.openai.completions.create(model=MODEL, prompt="no", max_tokens=2)
    first.join(30)
    second.join(30)
    assert sorted(got) == [5, 1500]
    assert small.is_idle()


def test_one_prompt_of_several_that_is_refused_ends_all(small: RunningServer) -> None:
    body = {"model": MODEL, "prompt": [PROMPT] * 4, "max_tokens": 1000, "ignore_eos": True}
    for stream in (False, True):
        response = small.post("/v1/completions", {**body, "stream": stream})
        assert response.status_code == 429
        wait_until(small.is_idle)

"""What is found out of a server before it is measured, and what it is sent."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from fake_server import MODEL, fake_server, requests, response, run
from server_fixtures import serve, tiny_engine

from stallfree.bench.endpoint import Endpoint, prepare
from stallfree.bench.prompts import OWN_WORDS, Prompts, PromptSize
from stallfree.bench.workload import Arrival
from stallfree.errors import ConfigError, EndpointError


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
        ({"models": response(200, b"[" * 100_000)}, "no JSON object"),
        ({"models": response(200, b'{"data": []}')}, "--model"),
        ({"models": response(200, b'{"data": [{}]}')}, "--model"),
        ({"models": response(401, b'{"error": "no key"}')}, "status 401: no key"),
        ({"probe": response(400, b'{"error": "extra: ignore_eos"}')}, "'{\"ignore_eos\": null}'"),
        ({"probe": response(400, b"[" * 100_000)}, "status 400: [[["),
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


def test_prompts_share_as_many_tokens_as_planned() -> None:
    prompts = Prompts(PromptSize(2.0), salt=1)
    one, same, other = (
        prompts.text(number, Arrival(0, 140, 1, prefix, 100)).split()
        for number, prefix in enumerate((4, 4, 5))
    )
    assert len(one) == len(same) == len(other) == 70
    assert one[:50] == same[:50] != other[:50]
    assert one[50:] != same[50:]
    all_shared = [prompts.text(number, Arrival(0, 100, 1, 4, 100)).split() for number in range(30)]
    assert len({" ".join(words[:49]) for words in all_shared}) == 1
    assert len({words[49] for words in all_shared}) > 1


def turns_of(prefix_id: int) -> Arrival:
    return Arrival(0, 50, 1, prefix_id)


def test_prompts_are_measured_on_a_small_context(tmp_path: Path) -> None:
    with serve(tiny_engine(tmp_path, max_model_len=512)) as small:
        ready = asyncio.run(prepare(Endpoint(small.url)))
    assert ready.max_model_len == 512
    assert ready.size is not None
    assert ready.size.is_measured

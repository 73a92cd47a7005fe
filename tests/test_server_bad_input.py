"""Bad requests: each gets an OpenAI error body, while another request streams undisturbed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError
from server_fixtures import MODEL, RunningServer, serve, tiny_engine, wait_until

from stallfree.engine.async_engine import AsyncEngine
from stallfree.engine.engine import Engine
from stallfree.engine.settings import ServerSettings
from stallfree.errors import ConfigError
from stallfree.server.app import create_app

CONTEXT = 1024
VOCABULARY = 512
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


class Bystander:
    """A client that streams the same request again and again."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.num_chunks = 0
        self.undisturbed = self._stream()
        self.disturbed: list[str] = []
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.disturbed.append(self._stream())

    def _stream(self) -> str:
        text = ""
        for chunk in self._server.openai.completions.create(
            model=MODEL,
            prompt="A prompt is read in chunks",
            max_tokens=300,
            temperature=0.8,
            seed=5,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            text += chunk.choices[0].text
            self.num_chunks += 1
        return text


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    engine = tiny_engine(tmp_path_factory.mktemp("bad"), max_model_len=CONTEXT)
    with serve(engine) as running:
        yield running
        wait_until(running.is_idle)
        engine.scheduler.check_integrity()


@pytest.fixture(scope="module")
def bystander(server: RunningServer) -> Iterator[Bystander]:
    streaming = Bystander(server)
    try:
        yield streaming
    finally:
        streaming.stop()
    assert streaming.disturbed
    assert set(streaming.disturbed) == {streaming.undisturbed}


@pytest.fixture
def live(bystander: Bystander) -> Iterator[None]:
    """The bystander gets tokens before and after the test."""
    before = bystander.num_chunks
    wait_until(lambda: bystander.num_chunks > before)
    yield
    after = bystander.num_chunks
    wait_until(lambda: bystander.num_chunks > after)


def assert_error(response: Any, status: int, param: str | None = None, said: str = "") -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["param"] == param
    assert said in error["message"]
    assert len(error["message"]) < 500
    assert "Traceback" not in response.text
    assert "/src/" not in response.text


COMPLETION_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "prompt is empty"),
    ({"prompt": []}, "prompt", "empty list"),
    ({"prompt": [""]}, "prompt", "prompt is empty"),
    ({"prompt": [[]]}, "prompt", "prompt is empty"),
    ({"prompt": 7}, "prompt", "prompt is 7"),
    ({"prompt": [VOCABULARY]}, "prompt", "512"),
    ({"prompt": [3, -1]}, "prompt", "-1"),
    ({"prompt": [3, 2**70]}, "prompt", str(2**70)),
    ({"prompt": [10**4000]}, "prompt", "1000"),
    ({"prompt": [3, True]}, "prompt", "true"),
    ({"prompt": [3, 1.5]}, "prompt", "1.5"),
    ({"prompt": [[3, None]]}, "prompt", "null"),
    ({"prompt": ["a"] * 2000}, "prompt", "2000 prompts"),
    ({"prompt": ["a"] * 20, "n": 100}, "prompt", "2000 completions"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be at least 1"),
    ({"max_tokens": -5}, "max_tokens", "-5"),
    ({"max_tokens": "many"}, "max_tokens", "'many'"),
    ({"temperature": -0.1}, "temperature", "-0.1"),
    ({"temperature": 1e9}, "temperature", "1000000000.0"),
    ({"temperature": "hot"}, "temperature", "'hot'"),
    ({"temperature": [1]}, "temperature", "a list of 1"),
    ({"top_p": 0}, "top_p", "top_p is 0"),
    ({"top_p": 1.01}, "top_p", "1.01"),
    ({"top_k": -2}, "top_k", "-2"),
    ({"min_p": 2}, "min_p", "min_p is 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "at least 0.01"),
    ({"stop_token_ids": [1] * 200}, "stop_token_ids", "limit is 128"),
    ({"presence_penalty": 3}, "presence_penalty", "3"),
    ({"frequency_penalty": -3}, "frequency_penalty", "-3"),
    ({"n": 0}, "n", "n is 0"),
    ({"n": 10**6}, "n", "1000000"),
    ({"seed": 2**80}, "seed", "seed is"),
    ({"stop": [str(i) for i in range(200)]}, "stop", "200"),
    ({"stop": ""}, "stop", "empty"),
    ({"stop": "x" * 100_000}, "stop", "100000"),
    ({"stop": 5}, "stop", "stop is 5"),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids", "512"),
    ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", "512"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "101"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias", "2000"),
    ({"logprobs": 21}, "logprobs", "21"),
    ({"logprobs": True}, "logprobs", "true"),
    ({"min_tokens": 99}, "min_tokens", "99"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"best_of": 3}, "best_of", "best_of is 3"),
    ({"no_such_field": 1}, "no_such_field", "Unrecognized request argument supplied"),
    ({"stream": "yes"}, "stream", "'yes'"),
]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-46},
        {"top_k": 2**40},
        {"top_p": 1e-300},
        {"repetition_penalty": 0.01},
        {"min_p": 1},
        {"logit_bias": {str(token): -100 for token in range(VOCABULARY)}},
    ],
    ids=lambda value: str(value)[:40],
)
def test_extremes_are_answered(server: RunningServer, live: None, fields: dict[str, Any]) -> None:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 4, "ignore_eos": True, **fields}
    response = server.post(COMPLETIONS, body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("fields", "param", "said"), COMPLETION_FIELDS, ids=lambda value: str(value)[:40]
)
def test_bad_fields(
    server: RunningServer, live: None, fields: dict[str, Any], param: str, said: str
) -> None:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 4, "stream": True, **fields}
    assert_error(server.post(COMPLETIONS, body), 400, param, said)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": []}, "messages", "empty list"),
        ({"messages": "hi"}, "messages", "messages is 'hi'"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "'wizard'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "is 5"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ({"top_logprobs": 5}, "top_logprobs", "only allowed with logprobs"),
    ],
)
def test_bad_chats(
    server: RunningServer, live: None, fields: dict[str, Any], param: str, said: str
) -> None:
    body = {"model": MODEL, "messages": [USER], **fields}
    assert_error(server.post(CHAT, body), 400, param, said)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"prompt": "river " * 5000}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * CONTEXT}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * 500_000}, "prompt"),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": CONTEXT}, "max_tokens"),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 10**30}, "max_tokens"),
        (COMPLETIONS, {"prompt": ["hi", "river " * 5000]}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "river " * 5000}]}, "messages"),
        (CHAT, {"messages": [USER], "max_tokens": CONTEXT}, "max_tokens"),
        ("/detokenize", {"tokens": [5] * 500_000}, "tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_more_than_the_context(
    server: RunningServer, live: None, path: str, fields: dict[str, Any], param: str
) -> None:
    response = server.post(path, {"model": MODEL, **fields})
    assert_error(response, 400, param, "context")
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"model": "tiny", "prompt": "hi", "temperature": NaN}', "not JSON"),
        (b'{"model": "tiny", "prompt": "hi", "temperature": -Infinity}', "not JSON"),
        (b'{"model": "tiny", "prompt": "hi", "temperature": 1e999}', "finite"),
        (b'{"model": "tiny", "prompt": "\xff\xfe"}', "UTF-8"),
        (rb'{"model": "tiny", "prompt": "\ud800"}', "hex escape"),
        (b"[" * 50_000, "recursion limit"),
        (b'{"prompt":' * 50_000, "recursion limit"),
        (b'{"model": "tiny", "prompt": ' + b"[" * 100 + b"]" * 100 + b"}", "list"),
        (b"[1, 2]", "JSON object"),
        (b"\x00\x01\x02", "not JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bodies_that_are_no_json(server: RunningServer, live: None, body: bytes, said: str) -> None:
    response = server.http.post(COMPLETIONS, content=body)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


def test_the_client_raises_what_it_should(server: RunningServer, live: None) -> None:
    with pytest.raises(BadRequestError) as caught:
        server.openai.completions.create(model=MODEL, prompt="hi", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(BadRequestError) as caught:
        server.openai.completions.create(model=MODEL, prompt="river " * 5000, stream=True)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"prompt": "a"}),
        (CHAT, {"messages": [USER]}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_unknown_model(
    server: RunningServer, live: None, path: str, fields: dict[str, Any]
) -> None:
    body = {"model": "gpt-17", **fields}
    response = server.post(path, body)
    assert_error(response, 404, "model", "'gpt-17'")
    assert response.json()["error"]["code"] == "model_not_found"


def test_unknown_path_and_method(server: RunningServer, live: None) -> None:
    assert_error(server.http.get("/v1/nothing"), 404, None, "/v1/nothing")
    assert_error(server.http.get("/" + "x" * 5000), 404)
    response = server.http.get(COMPLETIONS)
    assert_error(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", [COMPLETIONS, "/tokenize"])
def test_a_body_over_the_limit(server: RunningServer, live: None, path: str) -> None:
    text = json.dumps({"model": MODEL, "prompt": "x" * 10_000_000}).encode()
    limit = str(ServerSettings().max_body_bytes)
    assert_error(server.http.post(path, content=text), 413, None, limit)


def test_a_body_over_the_limit_in_chunks(server: RunningServer, live: None) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(160):
            yield b"x" * 65_536

    response = server.http.post(COMPLETIONS, content=chunks())
    assert_error(response, 413, None, str(ServerSettings().max_body_bytes))


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json; charset=utf-8", 200),
        ("application/problem+json", 200),
        ("", 200),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain", 415),
    ],
)
def test_content_types(server: RunningServer, live: None, content_type: str, status: int) -> None:
    headers = {"content-type": content_type} if content_type else {}
    body = b'{"prompt": "hi"}'
    assert server.http.post("/tokenize", content=body, headers=headers).status_code == status


@pytest.mark.parametrize(
    "tokens", [[], [VOCABULARY], [-1], ["1"], [True], [1.0], 5, {"a": 1}], ids=str
)
def test_bad_tokens(server: RunningServer, live: None, tokens: Any) -> None:
    assert_error(server.post("/detokenize", {"tokens": tokens}), 400, "tokens", "tokens")


def test_bad_text_to_tokenize(server: RunningServer, live: None) -> None:
    assert_error(server.post("/tokenize", {"prompt": ""}), 400, "prompt")
    assert_error(server.post("/tokenize", {"prompt": 5}), 400, "prompt", "prompt is 5")
    assert_error(server.post("/tokenize", {"prompt": "a", "messages": [USER]}), 400, "prompt")


def test_an_unexpected_error_says_nothing_of_itself(
    server: RunningServer, live: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(text: str, add_special_tokens: bool) -> list[int]:
        raise ZeroDivisionError("in /secret/place")

    monkeypatch.setattr(server.engine.engine.tokenizer, "encode", fail)
    response = server.post(COMPLETIONS, {"model": MODEL, "prompt": "hi"})
    assert_error(response, 500)
    assert "secret" not in response.text
    assert "ZeroDivisionError" not in response.text


@pytest.fixture(scope="module")
def other_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("templates"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] / 2 }}",
        "{{ raise_exception('no such luck') }}",
        "{{ undefined.attribute }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_chat_template_that_fails(other_engine: Engine, tmp_path: Path, template: str) -> None:
    path = tmp_path / "failing.jinja"
    path.write_text(template)
    with serve(other_engine, chat_template=path) as server:
        response = server.post(CHAT, {"model": MODEL, "messages": [USER], "max_tokens": 2})
        assert_error(response, 400, "messages")
        assert server.post(COMPLETIONS, {"model": MODEL, "prompt": "hi"}).status_code == 200


@pytest.mark.parametrize("template", [b"{% for message in messages %}", b"\xff"])
def test_a_chat_template_that_is_none(
    other_engine: Engine, tmp_path: Path, template: bytes
) -> None:
    path = tmp_path / "broken.jinja"
    path.write_bytes(template)
    with pytest.raises(ConfigError, match=r"broken\.jinja cannot be used"):
        create_app(AsyncEngine(other_engine), ServerSettings(chat_template=path))


@pytest.mark.parametrize(
    ("template", "said"),
    [("{% for message in messages %}", "broken"), (None, "no chat template")],
)
def test_a_model_without_a_good_chat_template(
    other_engine: Engine, monkeypatch: pytest.MonkeyPatch, template: str | None, said: str
) -> None:
    monkeypatch.setattr(other_engine.tokenizer, "chat_template", template)
    with serve(other_engine) as server:
        response = server.post(CHAT, {"model": MODEL, "messages": [USER]})
        assert_error(response, 400, "messages", said)

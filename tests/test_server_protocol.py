"""Request bodies without a server: what is taken, and what is said of the rest."""

from __future__ import annotations

from typing import Any

import pytest

from stallfree.errors import (
    ContextLengthError,
    EngineStoppedError,
    ExecutorError,
    InvalidRequestError,
    TokenizerError,
)
from stallfree.server.body import parse_object
from stallfree.server.errors import MAX_MESSAGE_CHARS, api_error
from stallfree.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from stallfree.server.validation import Body, parse

USER = {"role": "user", "content": "hi"}


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, {"model": "m", "prompt": "hi", **fields})


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, {"model": "m", "messages": [USER], **fields})


def refused(body: type[Body], fields: dict[str, Any]) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse(body, fields)
    return caught.value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"a": 1}{',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": ' + b"1" * 5000 + b"}",
        b'{"a": "\xff"}',
        b'\xef\xbb\xbf{"a": 1}',
        rb'{"a": "\ud83d"}',
        rb'{"a": "\ude42"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_bodies_that_are_no_json(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=r"not JSON in UTF-8: .* at line 1 column"):
        parse_object(body)


@pytest.mark.parametrize("body", [b"[1]", b'"text"', b"null"])
def test_bodies_that_are_no_object(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="must be a JSON object"):
        parse_object(body)


def test_a_body() -> None:
    assert parse_object(rb'{"a": "\ud83d\ude42", "b": "\\ud83d"}') == {"a": "🙂", "b": "\\ud83d"}


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_every_form_of_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompt == prompts


def test_sampling_params_of_a_completion() -> None:
    params = completion(
        n=2,
        max_tokens=5,
        min_tokens=1,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=7,
        logit_bias={"5": 1.5},
        stop="x",
        stop_token_ids=[4],
        ignore_eos=True,
        logprobs=3,
        echo=True,
    ).params()
    assert (params.n, params.max_tokens, params.min_tokens) == (2, 5, 1)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 3, 0.1)
    assert params.repetition_penalty == 1.1
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert params.seed == 7
    assert dict(params.logit_bias) == {5: 1.5}
    assert (params.stop, params.stop_token_ids) == (("x",), (4,))
    assert params.ignore_eos
    assert (params.logprobs, params.prompt_logprobs) == (3, 3)


def test_defaults() -> None:
    assert completion().params().max_tokens == 16
    assert completion(max_tokens=None, stop=None, n=None).params().max_tokens == 16
    assert chat().params().max_tokens is None
    assert chat(max_completion_tokens=9).params().max_tokens == 9
    assert chat().params().logprobs is None
    assert chat(logprobs=True).params().logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).params().logprobs == 4
    assert completion().params().temperature == 1


def test_what_concerns_only_openai_is_ignored() -> None:
    chat(user="me", metadata={"a": "b"}, store=True, service_tier="auto", prompt_cache_key="k")
    chat(tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"])
    completion(user="me", suffix=None, best_of=1)


def test_messages() -> None:
    answer = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "d", "name": "n"},
        {"role": "user", "content": parts},
        answer,
    ]
    assert [message.variables() for message in chat(messages=messages).messages] == [
        {"role": "system", "content": "d", "name": "n"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "a"},
    ]


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"prompt": None}, "prompt", "prompt is required"),
        ({"prompt": 5}, "prompt", "prompt is 5"),
        ({"prompt": []}, "prompt", "at least 1 token"),
        ({"prompt": ["a", 1]}, "prompt", "has 1 at index 1"),
        ({"prompt": [[1], 1]}, "prompt", "has 1 at index 1"),
        ({"model": 5}, "model", "model is 5; it must be a valid string"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot'; it must be a valid number"),
        ({"temperature": True}, "temperature", "temperature is true"),
        ({"temperature": float("inf")}, "temperature", "finite"),
        ({"temperature": 10**400}, "temperature", "temperature is 1000"),
        ({"max_tokens": 1.5}, "max_tokens", "must be a valid integer"),
        ({"n": "2"}, "n", "n is '2'"),
        ({"n": [1]}, "n", "n is a list of 1"),
        ({"stream": 1}, "stream", "must be a valid boolean"),
        ({"stop": [1]}, "stop", "stop is a list of 1; it must be a string or a list of strings"),
        ({"stop": {"a": 1}}, "stop", "stop is an object"),
        ({"stop_token_ids": [1, True]}, "stop_token_ids[1]", "must be a valid integer"),
        ({"logit_bias": [1]}, "logit_bias", "must be an object"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "has the key 'x'"),
        ({"logit_bias": {"\u0661": 1}}, "logit_bias", "keys are token ids"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "keys are token ids"),
        ({"logit_bias": {"1": None}}, "logit_bias", "gives token 1 null"),
        ({"suffix": "end"}, "suffix", "suffix is not supported"),
        ({"best_of": 2}, "best_of", "best_of is 2; only n"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with"),
        ({"stream": True, "stream_options": {"a": 1}}, "stream_options.a", "Unrecognized"),
        ({"stream": True, "stream_options": 5}, "stream_options", "must be an object"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "not supported with stream"),
        ({"guided": 1}, "guided", "Unrecognized request argument supplied: guided"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "skip_special_tokens is false"),
    ],
)
def test_completions_refused(fields: dict[str, Any], param: str, reason: str) -> None:
    error = refused(CompletionRequest, {"model": "m", "prompt": "hi", **fields})
    assert error.param == param
    assert reason in str(error)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"messages": 5}, "messages", "messages is 5; it must be a valid list"),
        ({"messages": []}, "messages", "messages is an empty list; it must have at least 1"),
        ({"messages": [USER] * 5000}, "messages", "a list of 5000; 4096 are the limit"),
        ({"messages": ["hi"]}, "messages[0]", "must be an object"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "is required"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "is required"),
        ({"messages": [{**USER, "role": "wizard"}]}, "messages[0].role", "'wizard'"),
        ({"messages": [{**USER, "content": None}]}, "messages[0].content", "is required"),
        ({"messages": [{**USER, "content": [5]}]}, "messages[0].content", "has the part 5"),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            "'image_url'; only text is supported",
        ),
        ({"messages": [{**USER, "spell": 1}]}, "messages[0].spell", "Unrecognized"),
        ({"messages": [{**USER, "tool_calls": [1]}]}, "messages[0].tool_calls", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"audio": {}}, "audio", "not supported"),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
        ({"chat_template": "x"}, "chat_template", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "only allowed with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logprobs": 1}, "logprobs", "must be a valid boolean"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
    ],
)
def test_chats_refused(fields: dict[str, Any], param: str, reason: str) -> None:
    error = refused(ChatRequest, {"model": "m", "messages": [USER], **fields})
    assert error.param == param
    assert reason in str(error)


def test_missing_fields_are_named() -> None:
    assert "model is required" in str(refused(ChatRequest, {"messages": [USER]}))
    assert "prompt is required" in str(refused(CompletionRequest, {"model": "m"}))
    assert "tokens is required" in str(refused(DetokenizeRequest, {}))
    assert "prompt or messages is required" in str(refused(TokenizeRequest, {}))


@pytest.mark.parametrize("fields", [{"messages": [1] * 300_000}, {"prompt": [True] * 300_000}])
def test_a_wrong_list_costs_little_however_long(fields: dict[str, Any]) -> None:
    body = ChatRequest if "messages" in fields else TokenizeRequest
    assert len(str(refused(body, {"model": "m", **fields}))) < MAX_MESSAGE_CHARS


@pytest.mark.parametrize(
    ("error", "status", "code", "kind"),
    [
        (InvalidRequestError("x", "n"), 400, None, "invalid_request_error"),
        (ContextLengthError("x"), 400, "context_length_exceeded", "invalid_request_error"),
        (TokenizerError("x"), 400, None, "invalid_request_error"),
        (EngineStoppedError("/secret"), 503, None, "server_error"),
        (ExecutorError("/secret"), 500, None, "server_error"),
        (ValueError("/secret"), 500, None, "server_error"),
    ],
)
def test_errors_on_the_wire(error: Exception, status: int, code: str | None, kind: str) -> None:
    answer = api_error(error)
    assert answer.status == status
    body = answer.body()["error"]
    assert (body["code"], body["type"]) == (code, kind)
    assert "/secret" not in body["message"]


def test_long_messages_are_shortened() -> None:
    message = api_error(InvalidRequestError("a" * 10_000)).body()["error"]["message"]
    assert len(message) < MAX_MESSAGE_CHARS + 10

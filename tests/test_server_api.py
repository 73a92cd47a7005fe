"""The endpoints as the `openai` client and plain HTTP see them, against a real tiny model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import NotFoundError
from openai.types.chat import ChatCompletionUserMessageParam
from server_fixtures import IDLE_HEALTH, MODEL, RunningServer, events, serve, tiny_engine

PROMPT = "The quick brown fox"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "extra_body": {"ignore_eos": True}}
USER: ChatCompletionUserMessageParam = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serve(tiny_engine(tmp_path_factory.mktemp("api"))) as running:
        yield running


def completion(server: RunningServer, **fields: Any) -> dict[str, Any]:
    """The answer to a greedy completion over plain HTTP."""
    body = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "ignore_eos": True, **fields}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def streamed(server: RunningServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream over plain HTTP."""
    with server.http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(events(response.iter_lines()))


def test_models(server: RunningServer) -> None:
    (model,) = server.openai.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    assert server.openai.models.retrieve(MODEL).id == MODEL
    with pytest.raises(NotFoundError, match="'org/other' does not exist"):
        server.openai.models.retrieve("org/other")


def test_health_and_version(server: RunningServer) -> None:
    health = server.http.get("/health")
    assert (health.status_code, health.json()) == (
        200,
        IDLE_HEALTH,
    )
    assert server.http.get("/version").json()["version"].count(".") == 2


def test_documentation_names_the_fields(server: RunningServer) -> None:
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    assert {"CompletionRequest", "ChatRequest", "ChatMessage", "StreamOptions"} <= set(schemas)
    assert server.http.get("/docs").status_code == 200


def test_completion(server: RunningServer) -> None:
    answer = server.openai.completions.create(prompt=PROMPT, max_tokens=8, **GREEDY)
    (choice,) = answer.choices
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert choice.finish_reason == "length"
    assert choice.text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_a_completion_has_16_tokens_unless_told(server: RunningServer) -> None:
    assert completion(server)["usage"]["completion_tokens"] == 16


def test_streamed_completion_is_the_same(server: RunningServer) -> None:
    whole = server.openai.completions.create(prompt=PROMPT, max_tokens=40, **GREEDY)
    chunks = list(
        server.openai.completions.create(prompt=PROMPT, max_tokens=40, stream=True, **GREEDY)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_of_a_stream(server: RunningServer) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}
    chunks = streamed(
        server, "/v1/completions", {**body, "stream_options": {"include_usage": True}}
    )
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert not any("usage" in chunk for chunk in streamed(server, "/v1/completions", body))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_usage_tells_how_long_a_request_waited(
    server: RunningServer, stream: bool, chat: bool
) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked = {"messages": [USER]} if chat else {"prompt": [PROMPT, PROMPT]}
    body = {"model": MODEL, "max_tokens": 4, "ignore_eos": True, "n": 2, **asked}
    sent = time.perf_counter()
    if stream:
        body["stream_options"] = {"include_usage": True}
        usage = streamed(server, path, body)[-1]["usage"]
    else:
        usage = server.post(path, body).json()["usage"]
    took_ms = (time.perf_counter() - sent) * 1000
    assert 0 < usage["scheduling_delay_ms"] < took_ms


def test_prompts_in_every_form(server: RunningServer) -> None:
    ids = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    alone = completion(server)["choices"][0]["text"]
    assert completion(server, prompt=[PROMPT])["choices"][0]["text"] == alone
    assert completion(server, prompt=ids)["choices"][0]["text"] == alone
    several = completion(server, prompt=[ids, ids[:2]])
    assert several["choices"][0]["text"] == alone
    assert several["usage"]["prompt_tokens"] == len(ids) + 2


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_numbered_by_prompt(server: RunningServer, stream: bool) -> None:
    prompts = ["alpha beta", "gamma delta", "river"]
    body = {"model": MODEL, "temperature": 0, "max_tokens": 6, "ignore_eos": True}
    texts = ["" for _ in range(6)]
    if stream:
        for chunk in streamed(server, "/v1/completions", {**body, "prompt": prompts, "n": 2}):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    else:
        answer = completion(server, **body, prompt=prompts, n=2)
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        assert answer["usage"]["completion_tokens"] == 36
        texts = [choice["text"] for choice in answer["choices"]]
    alone = [completion(server, **body, prompt=p)["choices"][0]["text"] for p in prompts]
    assert texts == [text for text in alone for _ in range(2)]


def test_seed(server: RunningServer) -> None:
    sampled = [
        completion(server, temperature=1.5, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string(server: RunningServer, stream: bool) -> None:
    text = completion(server, max_tokens=30)["choices"][0]["text"]
    stop = text[10:13]
    body = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 30}
    body |= {"ignore_eos": True, "stop": ["never to be seen", stop]}
    if stream:
        choices = [c["choices"][0] for c in streamed(server, "/v1/completions", body)]
        stopped, reason = "".join(c["text"] for c in choices), choices[-1]["finish_reason"]
    else:
        (choice,) = completion(server, **body)["choices"]
        stopped, reason = choice["text"], choice["finish_reason"]
    assert stopped == text[: text.index(stop)]
    assert reason == "stop"


def test_logit_bias_and_stop_token_ids(server: RunningServer) -> None:
    bias = {"100": 100.0}
    answer = completion(server, max_tokens=3, logit_bias=bias, logprobs=0)["choices"][0]
    assert len(set(answer["logprobs"]["tokens"])) == 1
    answer = completion(server, max_tokens=3, logit_bias=bias, stop_token_ids=[100])
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(server: RunningServer, stream: bool) -> None:
    fields = {"max_tokens": 12, "logprobs": 3}
    whole = completion(server, **fields)["choices"][0]
    logprobs = whole["logprobs"]
    if stream:
        body = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "ignore_eos": True, **fields}
        chunks = streamed(server, "/v1/completions", body)
        for name in logprobs:
            pieces = [c["choices"][0]["logprobs"][name] for c in chunks]
            assert list(itertools.chain(*pieces)) == logprobs[name]
    assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == 12
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert logprobs["text_offset"][-1] <= len(whole["text"])


def test_text_offsets_find_the_tokens(server: RunningServer) -> None:
    prompt = "table 你好 🙂 <|im_end|> stone"
    choice = completion(server, prompt=prompt, echo=True, logprobs=0, max_tokens=1)["choices"][0]
    logprobs = choice["logprobs"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"].startswith(token, offset)
    assert "<|im_end|>" in logprobs["tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_echo(server: RunningServer, stream: bool, n: int) -> None:
    fields: dict[str, Any] = {"max_tokens": 5, "echo": True, "n": n, "logprobs": 1}
    plain = completion(server, max_tokens=5, logprobs=1)["choices"][0]
    ids = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    texts = [""] * n
    tokens: list[list[str]] = [[] for _ in range(n)]
    logprobs: list[list[float | None]] = [[] for _ in range(n)]
    if stream:
        body = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "ignore_eos": True, **fields}
        choices = [c["choices"][0] for c in streamed(server, "/v1/completions", body)]
    else:
        choices = completion(server, **fields)["choices"]
    for choice in choices:
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += choice["logprobs"]["tokens"]
        logprobs[choice["index"]] += choice["logprobs"]["token_logprobs"]
    for index in range(n):
        assert texts[index] == PROMPT + plain["text"]
        assert "".join(tokens[index][: len(ids)]) == PROMPT
        assert logprobs[index][0] is None
        assert all(logprob is not None for logprob in logprobs[index][1:])
        assert logprobs[index][len(ids) :] == pytest.approx(
            plain["logprobs"]["token_logprobs"], abs=1e-4
        )


def test_echo_without_logprobs_of_token_ids(server: RunningServer) -> None:
    ids = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    text = completion(server, max_tokens=5)["choices"][0]["text"]
    assert completion(server, prompt=ids, max_tokens=5, echo=True)["choices"][0]["text"] == (
        PROMPT + text
    )


def test_prompt_logprobs(server: RunningServer) -> None:
    ids = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    positions = completion(server, prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    assert positions[0] is None
    for token_id, position in zip(ids[1:], positions[1:], strict=True):
        assert len(position) in (2, 3)
        assert position[str(token_id)]["logprob"] <= 0


def test_chat(server: RunningServer) -> None:
    answer = server.openai.chat.completions.create(messages=[USER], max_tokens=8, **GREEDY)
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content
    rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    same = completion(server, prompt=rendered, max_tokens=8)
    assert same["choices"][0]["text"] == choice.message.content
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == same["usage"]["prompt_tokens"]


def test_streamed_chat_is_the_same(server: RunningServer) -> None:
    whole = server.openai.chat.completions.create(messages=[USER], max_tokens=40, **GREEDY)
    chunks = list(
        server.openai.chat.completions.create(
            messages=[USER],
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    usages = [usage.to_dict() for usage in (chunks[-1].usage, whole.usage) if usage is not None]
    assert all(usage.pop("scheduling_delay_ms") for usage in usages)  # no two wait the same time
    assert all(usage.pop("prompt_tokens_details") for usage in usages)  # the first is cached
    assert usages[0] == usages[1]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_chat_runs_to_the_end_of_the_context_unless_told(server: RunningServer) -> None:
    num_tokens = server.post("/tokenize", {"prompt": "river mountain "}).json()["count"]
    filler = "river mountain " * (1900 // num_tokens)
    answer = server.openai.chat.completions.create(
        messages=[{"role": "user", "content": filler}], **GREEDY
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 2048
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(server: RunningServer, stream: bool) -> None:
    body = {"model": MODEL, "messages": [USER], "max_tokens": 6, "temperature": 0}
    body |= {"logprobs": True, "top_logprobs": 2, "ignore_eos": True}
    entries: list[dict[str, Any]] = []
    if stream:
        chunks = streamed(server, "/v1/chat/completions", body)
        for chunk in chunks:
            entries += chunk["choices"][0]["logprobs"]["content"]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    else:
        choice = server.post("/v1/chat/completions", body).json()["choices"][0]
        entries, text = choice["logprobs"]["content"], choice["message"]["content"]
    assert len(entries) == 6
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace") == text
    for entry in entries:
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]


def test_several_answers_of_a_chat(server: RunningServer) -> None:
    answer = server.openai.chat.completions.create(
        model=MODEL, messages=[USER], max_tokens=8, n=3, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3


def test_tokenize_and_detokenize(server: RunningServer) -> None:
    text = "table 你好 🙂<|im_end|>"
    answer = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = server.post("/tokenize", {"messages": [USER]}).json()["tokens"]
    rendered = server.post("/detokenize", {"tokens": chat}).json()["prompt"]
    assert rendered == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_the_model_can_have_another_name_and_template(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    with serve(
        tiny_engine(tmp_path), served_model_name="org/alias", chat_template=template
    ) as server:
        assert server.openai.models.retrieve("org/alias").id == "org/alias"
        ids = server.post("/tokenize", {"model": "org/alias", "messages": [USER]}).json()["tokens"]
        assert server.post("/detokenize", {"tokens": ids}).json()["prompt"] == "hello!"
        assert server.post("/tokenize", {"model": MODEL, "prompt": "a"}).status_code == 404

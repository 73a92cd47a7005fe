"""The server with the demo model, which answers sense."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai.types.chat import ChatCompletionMessageParam
from server_fixtures import RunningServer, serve, wait_until

from stallfree.engine.build import build_engine
from stallfree.engine.settings import EngineSettings

pytestmark = [pytest.mark.model, pytest.mark.slow]

QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Answer with one word."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    settings = EngineSettings(scheduler="vllm", max_model_len=2048, kv_cache_memory_bytes=256 << 20)
    with serve(build_engine(settings, show_progress=False)) as running:
        yield running


@pytest.fixture(scope="module")
def model(server: RunningServer) -> str:
    return server.openai.models.list().data[0].id


def test_a_sensible_answer(server: RunningServer, model: str) -> None:
    answer = server.openai.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    (choice,) = answer.choices
    assert "Paris" in (choice.message.content or "")
    assert "<|" not in (choice.message.content or "")
    assert choice.finish_reason == "stop"


def test_the_streamed_answer_is_the_same(server: RunningServer, model: str) -> None:
    whole = server.openai.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    chunks = server.openai.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


def test_code_is_completed(server: RunningServer, model: str) -> None:
    answer = server.openai.completions.create(
        model=model, prompt="def add(a, b):\n    return", max_tokens=8, temperature=0, stop="\n"
    )
    assert answer.choices[0].text.strip() == "a + b"
    assert answer.choices[0].finish_reason == "stop"


def test_health_answers_during_one_long_iteration(server: RunningServer, model: str) -> None:
    """The scheduler `vllm` runs a whole prompt in one iteration: seconds on a CPU."""
    with ThreadPoolExecutor(1) as pool:
        body = {"model": model, "prompt": [100] * 600, "max_tokens": 1}
        work = pool.submit(server.post, "/v1/completions", body)
        wait_until(lambda: server.engine.num_running == 1)
        worst_s, num_answers = 0.0, 0
        while not work.done():
            started = time.monotonic()
            assert server.http.get("/health").status_code == 200
            worst_s = max(worst_s, time.monotonic() - started)
            num_answers += 1
    assert work.result().status_code == 200
    assert num_answers > 10
    assert worst_s < 1.0

"""Prefix caching as a client sees it: cached tokens in the usage, and salts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError
from openai.types import CompletionUsage
from server_fixtures import MODEL, RunningServer, serve, tiny_engine

BLOCK = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    engine = tiny_engine(tmp_path_factory.mktemp("model"), token_budget=64)
    with serve(engine) as running:
        yield running


def prompt(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(10, 300), k=count)


def cached(usage: CompletionUsage | None) -> int | None:
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    return usage.prompt_tokens_details.cached_tokens


def complete(server: RunningServer, prompt: Any, **fields: Any) -> int | None:
    """Cached tokens of a completion."""
    done = server.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=3, **fields)
    return cached(done.usage)


def test_the_usage_counts_cached_tokens(server: RunningServer) -> None:
    own = prompt(50, seed=1)
    assert complete(server, own) == 0
    assert complete(server, own) == 3 * BLOCK
    assert complete(server, [*own[:40], 5, 5]) == 40  # part of the third block is copied
    assert complete(server, own, echo=True) == 3 * BLOCK
    assert complete(server, own, echo=True, logprobs=1) == 0
    assert complete(server, own, extra_body={"prompt_logprobs": 1}) == 0


def test_of_several_completions_the_first_counts(server: RunningServer) -> None:
    own = prompt(50, seed=2)
    assert complete(server, own, n=3) == 0
    assert complete(server, own, n=3) == 3 * BLOCK


def test_of_several_prompts_all_count(server: RunningServer) -> None:
    first, second = prompt(50, seed=3), prompt(40, seed=4)
    complete(server, first)
    complete(server, second)
    assert complete(server, [first, second], n=2) == 5 * BLOCK


def test_a_chat_finds_its_last_turn(server: RunningServer) -> None:
    messages: list[Any] = [{"role": "user", "content": "alpha beta gamma delta " * 20}]
    chat = server.openai.chat.completions
    first = chat.create(model=MODEL, messages=messages, max_tokens=8)
    assert first.usage is not None
    assert cached(first.usage) == 0
    answer = {"role": "assistant", "content": first.choices[0].message.content or "x"}
    messages += [answer, {"role": "user", "content": "river"}]
    second = chat.create(model=MODEL, messages=messages, max_tokens=8)
    found = cached(second.usage)
    assert found is not None
    assert found % BLOCK == 0
    assert first.usage.prompt_tokens - 2 * BLOCK <= found <= first.usage.prompt_tokens + 8


def test_choices_wait_for_the_one_that_scores_the_prompt_they_echo(server: RunningServer) -> None:
    """The others find the prompt, and would begin before its logprobs are there."""
    own = prompt(400, seed=6)
    complete(server, own)
    create = server.openai.completions.create
    fields: Any = {"model": MODEL, "prompt": own, "max_tokens": 3, "n": 3, "temperature": 0}
    whole = create(**fields, echo=True, logprobs=1)
    texts, num_first = [""] * 3, [-1] * 3
    for chunk in create(**fields, echo=True, logprobs=1, stream=True):
        for choice in chunk.choices:
            assert choice.logprobs is not None
            assert choice.logprobs.tokens is not None
            if not texts[choice.index]:
                num_first[choice.index] = len(choice.logprobs.tokens)
            texts[choice.index] += choice.text
    assert texts == [each.text for each in whole.choices]
    assert min(num_first) >= 400


def test_a_stream_ends_with_cached_tokens(server: RunningServer) -> None:
    own = prompt(50, seed=5)
    for expected in (0, 3 * BLOCK):
        stream = server.openai.completions.create(
            model=MODEL,
            prompt=own,
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        usages = [chunk.usage for chunk in stream]
        assert not any(usages[:-1])
        assert cached(usages[-1]) == expected


def test_other_salts_share_nothing(server: RunningServer) -> None:
    own = prompt(50, seed=6)
    complete(server, own)
    for salt in ("tenant a", "tenant b"):
        salted = {"cache_salt": salt}
        assert complete(server, own, extra_body=salted) == 0
        assert complete(server, own, extra_body=salted) == 3 * BLOCK
    message: list[Any] = [{"role": "user", "content": "epsilon " * 40}]
    usages = [
        server.openai.chat.completions.create(
            model=MODEL, messages=message, max_tokens=1, extra_body={"cache_salt": salt}
        ).usage
        for salt in ("a", "b", "a")
    ]
    assert [cached(usage) == 0 for usage in usages] == [True, True, False]


@pytest.mark.parametrize(
    ("salt", "reason"),
    [
        ("", "it must have at least 1 character"),
        ("x" * 257, "it must have at most 256 characters"),
        (5, "it must be a valid string"),
    ],
)
def test_salts_are_checked(server: RunningServer, salt: object, reason: str) -> None:
    with pytest.raises(BadRequestError, match=reason) as refused:
        complete(server, [1, 2], extra_body={"cache_salt": salt})
    assert refused.value.param == "cache_salt"


def test_it_can_be_switched_off(tmp_path_factory: pytest.TempPathFactory) -> None:
    engine = tiny_engine(tmp_path_factory.mktemp("model"), prefix_caching=False)
    with serve(engine) as plain:
        own = prompt(50, seed=7)
        assert [complete(plain, own), complete(plain, own)] == [0, 0]

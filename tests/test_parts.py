"""Batches that cannot be run whole, on a tiny real model: the answers are the same."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from engine_fixtures import GREEDY, tiny_settings
from schedulers import request, scheduler

from stallfree import SamplingParams
from stallfree.core.batch import Batch, Chunk
from stallfree.core.request import FinishReason
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.outputs import Delta
from stallfree.engine.settings import EngineSettings
from stallfree.errors import ExecutorError, OutOfMemoryError
from stallfree.executor.output import Executor, ExecutorOutput

POISON = 77


class Small:
    """A real executor with memory for so many tokens, of which those of poisoned prompts fail."""

    def __init__(self, executor: Executor, most_tokens: int = 1 << 30) -> None:
        self.executor = executor
        self.most_tokens = most_tokens
        self.error: Exception = MemoryError("no memory for this batch")
        self.sizes: list[int] = []  # of what ran
        self.num_failures = 0

    def execute(self, batch: Batch) -> ExecutorOutput:
        is_poisoned = any(POISON in chunk.request.prompt_token_ids for chunk in batch.chunks)
        if batch.num_tokens > self.most_tokens or is_poisoned:
            self.num_failures += 1
            raise self.error
        self.sizes.append(batch.num_tokens)
        return self.executor.execute(batch)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return dataclasses.replace(tiny_settings(tmp_path_factory.mktemp("model")), token_budget=64)


@pytest.fixture
def engine(settings: EngineSettings) -> Engine:
    return build_engine(settings, show_progress=False)


def answers(engine: Engine, requests: dict[str, tuple[list[int], SamplingParams]]) -> Any:
    """All tokens and log probabilities of requests that run together, or why they failed."""
    for name, (prompt, params) in requests.items():
        engine.add(name, prompt, params)
    found: dict[tuple[str, int], list[Any]] = {}
    while engine.has_requests:
        for delta in engine.step():
            own = found.setdefault((delta.request_id, delta.index), [])
            own.append(delta.error or (delta.token_ids, delta.text, _rounded(delta)))
            engine.scheduler.check_integrity()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    return found


def _rounded(delta: Delta) -> Any:
    positions = [*(delta.prompt_logprobs or ()), *(delta.logprobs or ())]
    return [None if each is None else round(each.logprob, 4) for each in positions]


LOAD = {
    "short": ([1, 2, 3], GREEDY),
    "long": (list(range(5, 65)), dataclasses.replace(GREEDY, prompt_logprobs=0, logprobs=1)),
    "several": ([9] * 20, SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=9)),
    "random": ([4, 4], SamplingParams(temperature=1.0, seed=7, max_tokens=20, ignore_eos=True)),
}


@pytest.mark.parametrize("most_tokens", [1, 3, 10, 40])
def test_answers_are_the_same_in_parts(engine: Engine, most_tokens: int) -> None:
    expected = answers(engine, LOAD)
    engine.executor = small = Small(engine.executor, most_tokens)
    assert answers(engine, LOAD) == expected
    assert small.num_failures > 0
    assert max(small.sizes) <= most_tokens


def test_what_cannot_run_alone_fails_and_the_rest_goes_on(engine: Engine) -> None:
    expected = answers(engine, LOAD)
    engine.executor = Small(engine.executor)
    found = answers(engine, {**LOAD, "poisoned": ([1, POISON, *[2] * 40], GREEDY)})
    [[error]] = [found.pop(key) for key in [("poisoned", 0)]]
    assert isinstance(error, OutOfMemoryError)
    assert "MemoryError: no memory for this batch" in str(error)
    assert found == expected


def test_the_siblings_of_what_fails_fail_too(engine: Engine) -> None:
    engine.executor = small = Small(engine.executor)
    small.error = RuntimeError("a kernel failed")
    found = answers(engine, {**LOAD, "poisoned": ([POISON], dataclasses.replace(GREEDY, n=3))})
    errors = [found[("poisoned", index)] for index in range(3)]
    for [error] in errors:
        assert isinstance(error, ExecutorError)
        assert not isinstance(error, OutOfMemoryError)


def test_a_failure_that_passes_harms_nobody(engine: Engine) -> None:
    expected = answers(engine, LOAD)
    own = engine.executor

    class Once(Small):
        def execute(self, batch: Batch) -> ExecutorOutput:
            if self.num_failures == 0 and batch.num_decodes:
                self.num_failures += 1
                raise self.error
            return own.execute(batch)

    engine.executor = once = Once(own)
    assert answers(engine, LOAD) == expected
    assert once.num_failures == 1


def test_pytorch_says_that_memory_is_used_up(engine: Engine) -> None:
    """By a tensor that no machine has the memory for."""

    def forward(*_: Any) -> torch.Tensor:
        return torch.empty(1 << 60, dtype=torch.float32)

    engine.executor.decoder.forward = forward  # type: ignore[attr-defined]
    engine.add("one", [1, 2, 3], GREEDY)
    [delta] = engine.step()
    assert isinstance(delta.error, OutOfMemoryError)


def chunks_of(batch: Batch) -> list[tuple[str, int, int, bool]]:
    return [(c.request.request_id, c.start, c.stop, c.samples) for c in batch.chunks]


def leaves(batch: Batch) -> list[Batch]:
    halves = batch.halves()
    return [leaf for half in halves for leaf in leaves(half)] if halves else [batch]


def test_halves() -> None:
    decoding = [Chunk(request(f"d{i}"), 9, 1, samples=True, is_decode=True) for i in range(3)]
    prompt = Chunk(request("p"), 4, 5, samples=True, is_decode=False)
    batch = Batch([prompt, *decoding], token_limit=64)
    first, second = batch.halves()
    assert chunks_of(first) == [(f"d{i}", 9, 10, True) for i in range(3)]
    assert first.num_decodes == 3
    assert chunks_of(second) == [("p", 4, 9, True)]
    assert first.token_limit == second.token_limit == 64
    assert [len(half.chunks) for half in first.halves()] == [1, 2]
    assert [chunks_of(half) for half in second.halves()] == [
        [("p", 4, 6, False)],
        [("p", 6, 9, True)],
    ]
    assert Counter(leaf.num_tokens for leaf in leaves(batch)) == {1: 8}
    assert [leaf.num_decodes for leaf in leaves(batch)] == [1] * 3 + [0] * 5
    assert sum(len(leaf.sampling) for leaf in leaves(batch)) == 4
    assert Batch(decoding[:1]).halves() == ()


def test_a_request_that_failed_in_a_batch_is_gone_with_it() -> None:
    """`Scheduler.finish` on a request in flight, then `complete`, as the loop does it."""
    own = scheduler()
    own.add(victim := request("victim"))
    own.add(other := request("other"))
    batch = own.schedule()
    assert batch is not None
    own.finish(victim, FinishReason.ERROR)
    own.complete(batch, [-1, 5])
    own.check_integrity()
    assert victim.finish_reason is FinishReason.ERROR
    assert victim.output_token_ids == []
    assert other.output_token_ids == [5]

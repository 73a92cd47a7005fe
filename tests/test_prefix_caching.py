"""Prefix caching on tiny real models: the answers are those without it, whatever happens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import Failing, tiny_settings

from stallfree import SamplingParams
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.outputs import Delta
from stallfree.engine.profile_batches import Composition, measure

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=1)
RANDOM = replace(GREEDY, temperature=1.0, seed=5, n=4)
DTYPES = ("float32", "int8")

Answers = dict[tuple[str, int], list[Delta]]  # by request id and completion


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(10, 500), k=count)


def engines(folder: Path, dtype: str, num_blocks: int = 200) -> tuple[Engine, Engine]:
    """Two with the same weights: the first one keeps what it computed."""
    settings = replace(tiny_settings(folder), dtype=dtype, seed=1)
    facts = build_engine(settings, show_progress=False).facts
    size = num_blocks * facts.block_size * facts.kv_cache_bytes // facts.kv_cache_tokens
    settings = replace(settings, kv_cache_memory_bytes=size, max_num_seqs=200)
    made = [
        build_engine(replace(settings, prefix_caching=caches), show_progress=False)
        for caches in (True, False)
    ]
    return made[0], made[1]


def run(engine: Engine, aborts: dict[int, str] | None = None) -> Answers:
    """All deltas; before a step, a request may be aborted."""
    answers: Answers = {}
    steps = 0
    while engine.has_requests:
        if aborts and steps in aborts:
            engine.abort(aborts[steps])
        for delta in engine.step():
            assert delta.error is None
            answers.setdefault((delta.request_id, delta.index), []).append(delta)
        engine.scheduler.check_integrity()
        steps += 1
    return answers


def chosen(answers: Answers, *, exactly: bool = False) -> dict[tuple[str, int], list[Any]]:
    """The tokens of each completion; with their log probabilities to the last bit, if asked for."""
    return {
        place: [(delta.token_ids, delta.logprobs if exactly else None) for delta in deltas]
        for place, deltas in answers.items()
    }


def talk(engine: Engine) -> list[Answers]:
    """Two conversations of three turns that begin alike, then four answers to one of them."""
    begin = tokens(40)
    chats = [[*begin, 7], [*begin, 8]]
    turns = []
    for turn in range(3):
        for number, prompt in enumerate(chats):
            engine.add(f"{turn} {number}", prompt, GREEDY)
        turns.append(run(engine))
        for number, prompt in enumerate(chats):
            answer = [i for each in turns[-1][f"{turn} {number}", 0] for i in each.token_ids]
            prompt += [*answer, 9, 10, 11]
    engine.add("several", chats[0], RANDOM)
    turns.append(run(engine))
    return turns


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversations_are_answered_as_without_caching(tmp_path: Path, dtype: str) -> None:
    caching, plain = engines(tmp_path, dtype)
    is_exact = dtype == "int8"  # a row's result is the same in any batch
    ours, theirs = talk(caching), talk(plain)
    assert [chosen(each, exactly=is_exact) for each in ours] == [
        chosen(each, exactly=is_exact) for each in theirs
    ]
    cached = [{place: d[-1].num_cached_tokens for place, d in each.items()} for each in ours]
    # 41 tokens; then with 19 of 20 of the answer, as the last one is never run; and so on
    assert cached[0] == {("0 0", 0): 0, ("0 1", 0): 32}
    assert cached[1] == {("1 0", 0): 48, ("1 1", 0): 48}
    assert cached[2] == {("2 0", 0): 80, ("2 1", 0): 80}
    # one that begins late finds that the first has filled the block of the last 14 tokens
    assert {96} <= set(cached[3].values()) <= {96, 109}
    assert plain.scheduler.prefix_hits - 3 * 96 in (0, 13)  # the other completions of one prompt


@pytest.mark.parametrize("dtype", DTYPES)
def test_preemptions_and_aborts_change_no_token(tmp_path: Path, dtype: str) -> None:
    roomy = engines(tmp_path, dtype)[1]
    caching, plain = engines(tmp_path, dtype, num_blocks=12)
    is_exact = dtype == "int8"
    given = []
    for engine in (roomy, caching, plain):
        for number in range(6):
            prompt = [*tokens(35), *tokens(number, number)]
            engine.add(f"kept {number}", prompt, replace(GREEDY, max_tokens=40))
            engine.add(f"aborted {number}", prompt, replace(RANDOM, max_tokens=40))
        aborts = {7 * number: f"aborted {number}" for number in range(6)}
        given.append(chosen(run(engine, aborts), exactly=is_exact))
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    kept = [{p: each[p] for p in each if p[0].startswith("kept")} for each in given]
    assert kept[0] == kept[1] == kept[2]
    assert all(len(answer) == 40 for answer in kept[0].values())
    for engine in (caching, plain):
        assert engine.scheduler.preemptions["memory"] > 0
    for place, answer in given[1].items():  # those that were aborted, as far as they came
        longest = given[0].get(place, [])
        shorter = min(len(answer), len(longest))
        assert answer[:shorter] == longest[:shorter]


def test_what_a_failed_iteration_computed_is_not_used(tmp_path: Path) -> None:
    caching, plain = engines(tmp_path, "float32")
    prompt = tokens(60)
    plain.add("again", prompt, GREEDY)
    expected = chosen(run(plain))
    failing = Failing(caching)
    caching.executor = failing
    caching.add("fails", prompt, GREEDY)
    caching.step()
    failing.fails = True
    [delta] = caching.step()
    assert delta.finish_reason == "error"
    failing.fails = False
    caching.add("again", prompt, GREEDY)
    answers = run(caching)
    assert chosen(answers) == expected
    assert answers["again", 0][0].num_cached_tokens == 16  # what the first iteration computed


def test_log_probabilities_of_a_prompt_are_computed_although_it_is_known(tmp_path: Path) -> None:
    caching, _ = engines(tmp_path, "float32")
    prompt = tokens(40)
    caching.add("plain", prompt, GREEDY)
    run(caching)
    caching.add("scored", prompt, replace(GREEDY, prompt_logprobs=0))
    first = run(caching)["scored", 0][0]
    assert first.num_cached_tokens == 0
    assert first.prompt_logprobs is not None
    assert [each.token_id for each in first.prompt_logprobs[1:] if each] == prompt[1:]


def test_a_measurement_overwrites_what_was_kept(tmp_path: Path) -> None:
    caching, _ = engines(tmp_path, "float32")
    prompt = tokens(40)
    caching.add("before", prompt, GREEDY)
    expected = list(chosen(run(caching)).values())
    chunk = [Composition(chunk_tokens=64)]
    pool, vocabulary = caching.scheduler.pool, caching.vocab_size
    measured = measure(caching.executor, pool, vocabulary, chunk, repeats=1)
    assert [shape.num_tokens for shape, _ in measured] == [64]
    caching.add("after", prompt, GREEDY)
    answers = run(caching)
    assert list(chosen(answers).values()) == expected
    assert answers["after", 0][0].num_cached_tokens == 0


def test_each_engine_has_a_salt_of_its_own(tmp_path: Path) -> None:
    def keys(engine: Engine, prompt: Sequence[int]) -> list[bytes]:
        engine.add("one", prompt, GREEDY)
        return next(iter(engine.scheduler.waiting)).block_keys

    own, other = engines(tmp_path, "float32")[0], engines(tmp_path, "float32")[0]
    assert len({*keys(own, tokens(40)), *keys(other, tokens(40))}) == 4

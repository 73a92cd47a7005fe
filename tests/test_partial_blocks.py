"""Beginnings of blocks: found, copied, and for nobody else's eyes."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import tiny_settings
from hypothesis import given
from hypothesis import strategies as st

from stallfree import SamplingParams
from stallfree.core.partial_blocks import PartialBlocks
from stallfree.core.targets import Targets
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.errors import CopyError
from stallfree.executor.copier import BlockCopies, Copier

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
PLACES = [(b"one", "a"), (b"one", "b"), (b"two", "a")]

blocks_of_tokens = st.lists(st.integers(0, 2), min_size=4, max_size=4)


def num_common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@given(
    st.lists(st.tuples(st.sampled_from(PLACES), blocks_of_tokens), max_size=30),
    st.lists(st.tuples(st.sampled_from(PLACES), st.lists(st.integers(0, 2), max_size=4))),
    st.integers(0, 2**32),
)
def test_the_longest_common_beginning_is_found(
    held: list[tuple[tuple[bytes, str], list[int]]],
    asked: list[tuple[tuple[bytes, str], list[int]]],
    seed: int,
) -> None:
    known = PartialBlocks()
    for block, (place, tokens) in enumerate(held):
        known.add(block, *place, tokens)
    gone = set(random.Random(seed).sample(range(len(held)), len(held) // 3))
    for block in gone:
        known.remove(block)
    known.remove(len(held))  # was never there
    assert known.blocks == set(range(len(held))) - gone
    for place, tokens in asked:
        there = [
            (num_common(own, tokens), block)
            for block, (other, own) in enumerate(held)
            if other == place and block not in gone
        ]
        best = max((count for count, _ in there), default=0)
        found = known.find(*place, tokens)
        assert (found.num_tokens if found else 0) == best
        assert found is None or (found.num_tokens, found.block) in there


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(10, 500), k=count)


def make_engine(folder: Path, dtype: str = "int8", **changes: Any) -> Engine:
    settings = replace(tiny_settings(folder), dtype=dtype, seed=1)
    return build_engine(replace(settings, **changes), show_progress=False)


def answers(engine: Engine, prompts: list[list[int]], user: str = "") -> list[tuple[object, int]]:
    """The tokens of each with their log probabilities, and how much of its prompt was there."""
    for number, prompt in enumerate(prompts):
        engine.add(f"{number}", prompt, GREEDY, targets=Targets(user=user))
    made: dict[str, list[object]] = {f"{number}": [] for number in range(len(prompts))}
    cached = {}
    while engine.has_requests:
        for delta in engine.step():
            assert delta.error is None
            made[delta.request_id].append((delta.token_ids, delta.logprobs))
            cached[delta.request_id] = delta.num_cached_tokens
        engine.scheduler.check_integrity()
    return [(each, cached[name]) for name, each in made.items()]


def sharing(count: int, first: int) -> list[list[int]]:
    """Prompts that part within their fourth block of 16 tokens."""
    return [[*tokens(60), *tokens(8, first + number)] for number in range(count)]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"preemption_mode": "swap", "kv_cache_memory_bytes": 1 << 15},
    ],
    ids=["one process", "TP 2", "PP 2", "swap"],
)
def test_requests_that_part_within_a_block_share_its_beginning(
    tmp_path: Path, sizes: dict[str, Any]
) -> None:
    plain = make_engine(tmp_path, prefix_caching=False)
    prompts = [*sharing(5, 1), tokens(60), tokens(63), tokens(3)]
    expected = [answers(plain, [prompt])[0][0] for prompt in prompts]
    engine = make_engine(tmp_path, **sizes)
    try:
        given = [*answers(engine, prompts[:1]), *answers(engine, prompts[1:])]
    finally:
        engine.close()
    assert [answer for answer, _ in given] == expected
    if "kv_cache_memory_bytes" not in sizes:  # else some of it had to go
        assert [count for _, count in given] == [0, 60, 60, 60, 60, 59, 60, 0]


def test_the_same_prompt_again_is_there_but_for_its_last_token(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "float32")
    first, again = (answers(engine, [tokens(48)])[0] for _ in range(2))
    assert first[1] == 0
    assert again[1] == 47


def test_another_user_shares_whole_blocks_only(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    one, two, three = sharing(3, 1)
    assert answers(engine, [one], "alice")[0][1] == 0
    assert answers(engine, [two], "bob")[0][1] == 48
    assert answers(engine, [three], "alice")[0][1] == 60


def test_blocks_that_cannot_be_copied_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is copied any more, and no token is another."""
    expected = answers(make_engine(tmp_path, prefix_caching=False), sharing(4, 1))
    failures = []

    def fail(self: Copier, copies: BlockCopies) -> None:
        failures.append(copies)
        raise CopyError("there is no memory")

    monkeypatch.setattr(Copier, "copy", fail)
    engine = make_engine(tmp_path)
    given = [*answers(engine, sharing(1, 1)), *answers(engine, sharing(3, 2))]
    assert [answer for answer, _ in given] == [answer for answer, _ in expected]
    assert len(failures) == 1
    assert given[3][1] == 48  # it came after that

"""What the tests of swapping share: a tiny model without room for its requests, and its answers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine_fixtures import tiny_settings

from stallfree import SamplingParams
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.settings import EngineSettings

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
RANDOM = replace(GREEDY, temperature=1.0, seed=5, n=2)
NUM_BLOCKS = 12


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(10, 500), k=count)


def small(folder: Path, dtype: str = "float32", **changes: Any) -> EngineSettings:
    """Settings with `NUM_BLOCKS` blocks of KV."""
    settings = replace(tiny_settings(folder), dtype=dtype, seed=1)
    facts = build_engine(settings, show_progress=False).facts
    size = NUM_BLOCKS * facts.block_size * facts.kv_cache_bytes // facts.kv_cache_tokens
    return replace(settings, kv_cache_memory_bytes=size, max_num_seqs=20, **changes)


def add_all(engine: Engine) -> None:
    for number in range(6):
        prompt = [*tokens(35), *tokens(number, number)]
        engine.add(f"kept {number}", prompt, GREEDY)
        engine.add(f"aborted {number}", prompt, RANDOM)


def answers(engine: Engine) -> dict[str, list[int]]:
    """What those say that are not aborted, while some others are."""
    add_all(engine)
    given: dict[str, list[int]] = {}
    steps = 0
    while engine.has_requests:
        if steps % 9 == 0 and steps < 54:
            engine.abort(f"aborted {steps // 9}")
        for delta in engine.step():
            assert delta.error is None
            if delta.request_id.startswith("kept"):
                given.setdefault(delta.request_id, []).extend(delta.token_ids)
        engine.scheduler.check_integrity()
        steps += 1
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    return given

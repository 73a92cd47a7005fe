"""Swapping by several processes: each copies its own part, and one that cannot costs no token."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import tiny_settings
from swap_fixtures import answers, small

from stallfree import LLM
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.scheduler import Scheduler
from stallfree.core.swap import SwapCosts, SwapSpace
from stallfree.engine.build import build_engine
from stallfree.engine.clock import WallClock
from stallfree.engine.engine import Engine
from stallfree.errors import ConfigError
from stallfree.executor.distributed import DistributedPipeline
from stallfree.executor.launch import LocalProcess


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"pipeline_parallel_size": 2, "preemption_mode": "swap"}, "float32"),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "int8"),
    ],
)
def test_every_process_copies_its_own(tmp_path: Path, changes: dict[str, Any], dtype: str) -> None:
    settings = small(tmp_path / "model", dtype)
    expected = answers(build_engine(replace(settings, kv_cache_memory_bytes=4 << 20)))
    llm = LLM.from_settings(replace(settings, **changes))
    try:
        assert (llm.engine.scheduler.swap is not None) == ("preemption_mode" in changes)
        pipeline = llm.engine.executor
        assert isinstance(pipeline, DistributedPipeline)
        for folder in (None, tmp_path):
            times = pipeline.make_swap(40, folder)
            assert times.out_s > 0
            assert times.in_s > 0
            engine = engine_on(llm, lambda num_tokens: 1.0, 40)
            assert answers(engine) == expected
            assert engine.scheduler.swap is not None
            assert engine.scheduler.swap.num_in > 0
        # the disk of one of them fails
        resource.prlimit(pid_of(pipeline, -1), resource.RLIMIT_FSIZE, (0, 0))
        engine = engine_on(llm, lambda num_tokens: 1.0, 40)
        assert answers(engine) == expected
        assert engine.scheduler.swap is not None
        assert engine.scheduler.swap.num_out == 0
        assert engine.scheduler.preemptions["lost"] > 0
    finally:
        llm.close()


def test_workers_start_anew_without_a_swap_space_that_is_gone(tmp_path: Path) -> None:
    settings = small(tmp_path / "model")
    expected = answers(build_engine(replace(settings, kv_cache_memory_bytes=4 << 20)))
    folder = tmp_path / "swap"
    folder.mkdir()
    settings = replace(settings, preemption_mode="swap", swap_dir=folder)
    llm = LLM.from_settings(replace(settings, pipeline_parallel_size=2, restart_workers=True))
    try:
        folder.rmdir()
        pipeline = llm.engine.executor
        assert isinstance(pipeline, DistributedPipeline)
        os.kill(pid_of(pipeline, 0), signal.SIGKILL)
        assert answers(llm.engine) == expected
        assert not pipeline.can_swap
    finally:
        llm.close()


def pid_of(pipeline: DistributedPipeline, rank: int) -> int:
    worker = pipeline.workers[rank]
    assert isinstance(worker, LocalProcess)
    return worker.pid


def engine_on(llm: LLM, recompute_s: Callable[[int], float], num_slots: int) -> Engine:
    """Another engine on the same processes, for which copies take no time."""
    pipeline, own = llm.engine.executor, llm.engine.scheduler
    assert isinstance(pipeline, DistributedPipeline)
    pool = BlockPool(own.pool.num_blocks, own.pool.block_size)
    own.pool.forget()  # what its blocks hold is overwritten
    swap = SwapSpace(num_slots, pool.block_size, SwapCosts(recompute_s, 0.0, 0.0))
    scheduler = Scheduler(own.config, pool, StaticBudget(16), swap=swap)
    facts, clock = llm.engine.facts, WallClock()
    return Engine(scheduler, pipeline, clock, llm.tokenizer, facts, pipeline=pipeline)


def test_a_process_without_room_is_named(tmp_path: Path) -> None:
    settings = replace(tiny_settings(tmp_path), pipeline_parallel_size=2, preemption_mode="swap")
    with pytest.raises(ConfigError, match=r"rank \d \(layers .*No such file or directory"):
        build_engine(replace(settings, swap_dir=tmp_path / "missing"), show_progress=False)

"""Preemption by swapping on tiny real models: no token changes, and less is computed again."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import Failing, tiny_settings

from stallfree import LLM, SamplingParams
from stallfree.core.batch import NO_COPIES, Batch, Copies, CopyIn
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.core.swap import SwapCosts, SwapSpace
from stallfree.engine.build import build_engine
from stallfree.engine.clock import WallClock
from stallfree.engine.engine import Engine
from stallfree.engine.loop import OneStage
from stallfree.engine.meter import Meter
from stallfree.engine.settings import EngineSettings
from stallfree.errors import ConfigError, CopyError, ExecutorError, OutOfMemoryError
from stallfree.executor.distributed import DistributedPipeline
from stallfree.executor.launch import LocalProcess
from stallfree.executor.output import ExecutorOutput, Sample
from stallfree.executor.rerun import RerunningPipeline
from stallfree.executor.swap_store import CopyTimes, SwapStore

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
RANDOM = replace(GREEDY, temperature=1.0, seed=5, n=2)
NUM_BLOCKS = 12


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying is taken to be faster than anything that a tiny model does."""
    monkeypatch.setattr(SwapStore, "measure", lambda self: CopyTimes(1e-12, 1e-12))


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


def measured(settings: EngineSettings) -> tuple[dict[str, list[int]], Engine, int]:
    """The answers of an engine, it, and how many tokens it read."""
    engine = build_engine(settings, show_progress=False)
    meter = Meter()
    engine.observers.add(meter)
    return answers(engine), engine, meter.counts.num_prompt_tokens


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("caches", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_preemptions_and_aborts_change_no_token(tmp_path: Path, dtype: str, caches: bool) -> None:
    settings = small(tmp_path / "model", dtype, prefix_caching=caches)
    roomy = answers(build_engine(replace(settings, kv_cache_memory_bytes=4 << 20)))
    again, recomputing, num_read = measured(settings)
    assert again == roomy
    assert recomputing.scheduler.preemptions["memory"] > 0
    assert not recomputing.scheduler.swapped.total()
    for folder in (None, tmp_path):
        given, engine, num_read_here = measured(
            replace(settings, preemption_mode="swap", swap_space_bytes=1 << 20, swap_dir=folder)
        )
        assert given == roomy
        scheduler = engine.scheduler
        assert 0 < scheduler.swapped["memory"] <= scheduler.preemptions["memory"]
        assert scheduler.swap is not None
        assert scheduler.swap.num_in > 0
        assert scheduler.swap.num_out > 0
        assert scheduler.swap.num_used == 0
        assert num_read_here < num_read


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("fails_at", ["out", "in"])
def test_a_swap_space_that_fails_costs_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    settings = small(tmp_path / "model")
    roomy = answers(build_engine(replace(settings, kv_cache_memory_bytes=4 << 20)))
    true_copy, failures = SwapStore.copy, []

    def copy(
        self: SwapStore, outs: Sequence[tuple[int, int]], ins: Sequence[tuple[int, int]]
    ) -> None:
        if ins if fails_at == "in" else outs:
            failures.append((outs, ins))
            raise CopyError("the disk is gone")
        true_copy(self, outs, ins)

    monkeypatch.setattr(SwapStore, "copy", copy)
    given, engine, _ = measured(replace(settings, preemption_mode="swap", swap_space_bytes=1 << 20))
    assert given == roomy
    assert len(failures) == 1  # nothing is copied after that
    assert engine.scheduler.preemptions["lost"] > 0
    assert engine.scheduler.swap is not None
    assert engine.scheduler.swap.num_used == 0


def test_nothing_is_kept_that_is_computed_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(SwapStore, "measure", lambda self: CopyTimes(1e3, 1e3))
    with caplog.at_level(logging.INFO):
        _, engine, _ = measured(small(tmp_path, preemption_mode="swap", swap_space_bytes=1 << 20))
    assert "one is copied out in 1000000.000 ms and in in 1000000.000 ms" in caplog.text
    scheduler = engine.scheduler
    assert scheduler.preemptions["memory"] > 0
    assert scheduler.swapped["memory"] == 0
    assert scheduler.swap is not None
    assert scheduler.swap.num_out == scheduler.swap.num_in == 0


@pytest.mark.usefixtures("cheap")
def test_a_target_is_kept_beside_copies(tmp_path: Path) -> None:
    settings = replace(small(tmp_path), token_budget=None, tbt_slo_s=0.5)
    expected, recomputing, _ = measured(settings)
    given, engine, _ = measured(replace(settings, preemption_mode="swap"))
    assert given == expected
    assert recomputing.scheduler.preemptions["memory"] > 0
    assert engine.scheduler.swapped["memory"] > 0


@pytest.mark.usefixtures("cheap")
def test_a_batch_that_fails_loses_nothing_of_others(tmp_path: Path) -> None:
    """As it runs, once and for all: whatever was copied before is right in what goes on."""
    settings = small(tmp_path, preemption_mode="swap")
    expected = answers(build_engine(settings))
    engine = build_engine(settings)
    failing = engine.executor = Failing(engine)
    add_all(engine)
    given: dict[str, list[int]] = {}
    failed = set()
    steps = 0
    while engine.has_requests:
        failing.fails = steps in (25, 60, 61, 90)
        for delta in engine.step():
            if delta.error is not None:
                failed.add(delta.request_id)
            if delta.index == 0:
                given.setdefault(delta.request_id, []).extend(delta.token_ids)
        engine.scheduler.check_integrity()
        steps += 1
    assert failed
    assert engine.scheduler.swap is not None
    assert engine.scheduler.swap.num_in > 0
    assert engine.scheduler.swap.num_used == 0
    whole = [name for name in expected if name not in failed]
    assert whole
    for name in whole:
        assert given[name] == expected[name]


class _Fails:
    """An executor that cannot run more than a token at once."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def execute(self, batch: Batch) -> ExecutorOutput:
        self.events.append(f"run {batch.num_tokens}")
        if batch.num_tokens > 1:
            raise MemoryError("no memory for this batch")
        return ExecutorOutput((Sample(1),) * len(batch.sampling))


def copying_batch() -> Batch:
    scheduler = Scheduler(SchedulerConfig(max_model_len=64), BlockPool(20, 4), StaticBudget(64))
    params = SamplingParams(max_tokens=2)
    scheduler.add(Request("own", (1, 2), params, max_tokens=2))
    batch = scheduler.schedule()
    assert batch is not None
    batch.copies = Copies(ins=(CopyIn(0, 0),))
    return batch


def test_copies_are_done_once_although_a_batch_is_run_in_parts() -> None:
    events: list[str] = []
    stage = OneStage(lambda: _Fails(events), lambda copies: events.append(f"copy {copies.ins}"))
    stage.submit(copying_batch())
    stage.collect()
    assert events == [f"copy {(CopyIn(0, 0),)}", "run 2", "run 2", "run 1", "run 1"]


def test_nothing_runs_after_copies_that_failed() -> None:
    events: list[str] = []

    def copy(copies: Copies) -> None:
        raise CopyError("the disk is gone")

    stage = OneStage(lambda: _Fails(events), copy)
    stage.submit(copying_batch())
    with pytest.raises(CopyError, match="the disk is gone"):
        stage.collect()
    assert events == []


class _Pipeline:
    """One of two stages, whose first batch fails."""

    num_stages = 2
    can_swap = True

    def __init__(self, error: ExecutorError) -> None:
        self.error = error
        self.copied: list[Copies] = []
        self.results: list[ExecutorOutput | ExecutorError] = []

    def submit(self, batch: Batch) -> None:
        fails = not self.copied
        self.copied.append(batch.copies)
        output = ExecutorOutput((Sample(1),) * len(batch.sampling))
        self.results.append(self.error if fails else output)

    def collect(self) -> ExecutorOutput:
        result = self.results.pop(0)
        if isinstance(result, ExecutorError):
            raise result
        return result

    def execute(self, batch: Batch) -> ExecutorOutput:
        self.submit(batch)
        return self.collect()

    def starve(self) -> None: ...

    def tend(self) -> None: ...

    def restart(self) -> None: ...

    def close(self) -> None: ...


def test_a_batch_that_a_pipeline_runs_again_is_not_copied_again() -> None:
    inner = _Pipeline(OutOfMemoryError("no memory for this batch"))
    pipeline = RerunningPipeline(inner)
    first, second = copying_batch(), copying_batch()
    pipeline.submit(first)
    pipeline.submit(second)
    assert pipeline.collect().samples == (Sample(1),)
    assert pipeline.collect().samples == (Sample(1),)
    # as the second one has a request of the same name, it is run again too
    assert inner.copied == [first.copies, second.copies, NO_COPIES, NO_COPIES]


def test_a_batch_that_a_pipeline_could_not_copy_for_is_not_run_again() -> None:
    inner = _Pipeline(CopyError("the disk is gone"))
    pipeline = RerunningPipeline(inner)
    first, second = copying_batch(), copying_batch()
    pipeline.submit(first)
    pipeline.submit(second)
    with pytest.raises(CopyError, match="the disk is gone"):
        pipeline.collect()
    assert pipeline.collect().samples == (Sample(1),)
    assert inner.copied == [first.copies, second.copies]


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
    swap = SwapSpace(num_slots, pool.block_size, SwapCosts(recompute_s, 0.0, 0.0))
    scheduler = Scheduler(own.config, pool, StaticBudget(16), swap=swap)
    facts, clock = llm.engine.facts, WallClock()
    return Engine(scheduler, pipeline, clock, llm.tokenizer, facts, pipeline=pipeline)


def test_a_process_without_room_is_named(tmp_path: Path) -> None:
    settings = replace(tiny_settings(tmp_path), pipeline_parallel_size=2, preemption_mode="swap")
    with pytest.raises(ConfigError, match=r"rank \d \(layers .*No such file or directory"):
        build_engine(replace(settings, swap_dir=tmp_path / "missing"), show_progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preemption_mode": "keep"}, "preemption_mode is 'keep'; it must be one of recompute, s"),
        ({"swap_space_bytes": 1 << 30}, "swap_space is 1073741824, but nothing is swapped: give"),
        ({"swap_dir": Path("x")}, "swap_dir is x, but nothing is swapped: give preemption_mode"),
        ({"preemption_mode": "swap", "swap_space_bytes": 0}, "swap_space_bytes is 0; it must be"),
        ({"preemption_mode": "swap", "scheduler": "orca"}, "preemption_mode swap is of no use wi"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineSettings(**fields)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("size", "message"),
    [(1 << 50, "free beside the KV cache: lower it"), (100, "one block of 16 tokens takes")],
)
def test_a_swap_space_that_does_not_fit_is_refused(tmp_path: Path, size: int, message: str) -> None:
    settings = replace(tiny_settings(tmp_path), preemption_mode="swap", swap_space_bytes=size)
    with pytest.raises(ConfigError, match=message):
        build_engine(settings, show_progress=False)


def test_the_swap_space_is_as_large_as_the_kv_cache(tmp_path: Path) -> None:
    settings = replace(tiny_settings(tmp_path / "model"), preemption_mode="swap")
    for folder in (None, tmp_path):
        engine = build_engine(replace(settings, swap_dir=folder), show_progress=False)
        assert engine.scheduler.swap is not None
        assert engine.scheduler.swap.num_slots == engine.scheduler.pool.num_blocks

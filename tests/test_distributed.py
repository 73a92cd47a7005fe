"""A model in several processes: the same tokens as in one, and what a lost process costs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import GREEDY, PROMPTS, tiny_settings

from stallfree import LLM, SamplingParams
from stallfree.core.batch import Batch, Chunk
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.engine.clock import WallClock
from stallfree.engine.engine import Engine
from stallfree.engine.settings import EngineSettings
from stallfree.errors import ConfigError, ExecutorError, WorkersLostError
from stallfree.executor.distributed import DistributedPipeline
from stallfree.executor.launch import LocalProcess

LONG = replace(GREEDY, max_tokens=48)
MIXED = [
    LONG,
    replace(LONG, temperature=1.0, seed=3, top_p=0.9),
    replace(LONG, repetition_penalty=1.3, presence_penalty=0.5, logit_bias={7: -2.0}),
    replace(LONG, logprobs=2, prompt_logprobs=1),
]


@contextmanager
def running(settings: EngineSettings, **changes: Any) -> Iterator[LLM]:
    llm = LLM.from_settings(replace(settings, **changes))
    try:
        yield llm
    finally:
        llm.close()


def tokens(llm: LLM, params: list[SamplingParams]) -> list[tuple[int, ...]]:
    return [each.outputs[0].token_ids for each in llm.generate(PROMPTS, params)]


def workers(llm: LLM) -> list[LocalProcess]:
    pipeline = llm.engine.executor
    assert isinstance(pipeline, DistributedPipeline)
    own = [worker for worker in pipeline.workers if isinstance(worker, LocalProcess)]
    assert len(own) == len(pipeline.workers)
    return own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def settings(folder: Path) -> EngineSettings:
    return tiny_settings(folder)


@pytest.fixture(scope="module")
def expected(settings: EngineSettings) -> list[tuple[int, ...]]:
    """What one process gives for long greedy answers."""
    with running(settings) as one:
        return tokens(one, [LONG] * 4)


@pytest.fixture(scope="module")
def two(settings: EngineSettings) -> Iterator[LLM]:
    """Two stages, which no test ends."""
    with running(settings, pipeline_parallel_size=2) as llm:
        yield llm


def test_stages_give_what_one_process_gives(settings: EngineSettings, two: LLM) -> None:
    with running(settings) as one:
        assert_same(two, one)


def test_four_stages_give_what_one_process_gives_in_int8(tmp_path: Path) -> None:
    settings = replace(tiny_settings(tmp_path, num_hidden_layers=4), dtype="int8")
    with running(settings) as one, running(settings, pipeline_parallel_size=4) as four:
        assert_same(four, one)


GEMMA = {"head_dim": 32, "sliding_window": 16, "sliding_window_pattern": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "architecture", "shape"), [("float32", "gemma3_text", GEMMA), ("int8", "qwen2", {})]
)
def test_shares_of_stages_give_what_one_process_gives(
    tmp_path: Path, dtype: str, architecture: str, shape: dict[str, Any]
) -> None:
    """As they are, and under preemption and aborts."""
    settings = replace(tiny_settings(tmp_path, architecture, **shape), dtype=dtype)
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    with running(settings) as one, running(settings, **sizes) as several:
        assert_same(several, one, tolerance=0 if dtype == "int8" else 1e-4)
        engine = engine_on(several, "sarathi", num_blocks=8)
        given, num_preemptions = kept_of_aborted(engine, several)
        assert num_preemptions > 0
        assert given == tokens(one, [LONG] * 4)


def assert_same(several: LLM, one: LLM, tolerance: float = 0) -> None:
    """Both give the same tokens, and log probabilities that differ by less than `tolerance`."""
    given, expected = several.generate(PROMPTS, MIXED), one.generate(PROMPTS, MIXED)
    assert [each.outputs[0].token_ids for each in given] == [
        each.outputs[0].token_ids for each in expected
    ]
    assert several.engine.facts.num_parameters == one.engine.facts.num_parameters
    ours, theirs = given[3].prompt_logprobs, expected[3].prompt_logprobs
    assert ours is not None
    assert theirs is not None
    for mine, its in zip(ours[1:], theirs[1:], strict=True):
        assert mine is not None
        assert its is not None
        assert mine.logprob == pytest.approx(its.logprob, abs=tolerance, rel=0)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"tensor_parallel_size": 3}, "4 query heads"),
        ({"restart_workers": True}, "restart_workers is given, but the model runs in this process"),
        ({"pipeline_parallel_size": 9}, "pipeline_parallel_size is 9; the model has 2 layers"),
    ],
)
def test_what_cannot_be_split_is_refused(
    settings: EngineSettings, sizes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        LLM.from_settings(replace(settings, **sizes))


@pytest.mark.parametrize("policy", ["sarathi", "vllm", "orca", "faster_transformer"])
def test_preemption_and_aborts_change_no_token(
    two: LLM, expected: list[tuple[int, ...]], policy: str
) -> None:
    preempts = policy in ("sarathi", "vllm")
    engine = engine_on(two, policy, num_blocks=8 if preempts else 64)
    given, num_preemptions = kept_of_aborted(engine, two)
    assert (num_preemptions > 0) == preempts
    assert given == expected


def engine_on(llm: LLM, policy: str, num_blocks: int) -> Engine:
    """Another engine on the same processes, with some of their KV cache."""
    pipeline, own = llm.engine.executor, llm.engine.scheduler
    assert isinstance(pipeline, DistributedPipeline)
    pool = BlockPool(num_blocks, own.pool.block_size)
    own.pool.forget()  # what its blocks hold is overwritten
    config = replace(own.config, policy=policy, max_model_len=pool.num_tokens)
    scheduler = Scheduler(config, pool, StaticBudget(16))
    return Engine(
        scheduler, pipeline, WallClock(), llm.tokenizer, llm.engine.facts, pipeline=pipeline
    )


def kept_of_aborted(engine: Engine, llm: LLM) -> tuple[list[tuple[int, ...]], int]:
    """Long answers beside as many that are aborted meanwhile; and how often one was preempted."""
    for index, prompt in enumerate(PROMPTS):
        ids = llm.tokenizer.encode(prompt)
        engine.add(f"kept {index}", ids, LONG)
        engine.add(f"aborted {index}", ids, LONG)
    given: dict[str, list[int]] = {}
    steps = 0
    while engine.has_requests:
        for delta in engine.step():
            assert delta.error is None
            given.setdefault(delta.request_id, []).extend(delta.token_ids)
        steps += 1
        if steps % 5 == 0:
            engine.abort(f"aborted {steps // 5 - 1}")
    engine.scheduler.check_integrity()
    kept = [tuple(given[f"kept {index}"]) for index in range(len(PROMPTS))]
    return kept, sum(engine.scheduler.preemptions.values())


def test_a_long_prompt_is_in_several_stages_at_once(two: LLM) -> None:
    engine = two.engine
    engine.add("long", [5] * 100, GREEDY)
    engine.step()
    (request,) = engine.scheduler.running
    assert request.in_flight == 1  # one of two batches came back
    assert request.num_computed_tokens == 2 * 16
    while engine.has_requests:
        engine.step()


@pytest.mark.parametrize(("rank", "how"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_process_is_named(settings: EngineSettings, rank: int, how: signal.Signals) -> None:
    with running(settings, pipeline_parallel_size=2, worker_timeout_s=1.0) as own:
        processes = workers(own)
        own.engine.add("long", [5] * 100, LONG)
        own.engine.step()
        os.kill(processes[rank].pid, how)
        expected = "ended by SIGKILL" if how is signal.SIGKILL else "has not answered for 1 s"
        with pytest.raises(WorkersLostError, match=rf"rank {rank} \(layers .*{expected}"):
            until(own.engine.step)
        assert all(not alive(process.pid) for process in processes)


def test_a_batch_that_fails_in_one_stage_fails_alone(
    two: LLM, expected: list[tuple[int, ...]]
) -> None:
    pipeline = two.engine.executor
    unknown = Request("bad", [10**6], GREEDY, max_tokens=1)
    unknown.block_table = [two.engine.scheduler.pool.num_blocks - 1]  # which nobody uses
    batch = Batch([Chunk(unknown, 0, 1, True, False)])
    for _ in range(5):  # the first stage fails, and the second computes zeros
        with pytest.raises(ExecutorError, match=r"rank 0 .*failed:\n(.|\n)*IndexError"):
            pipeline.execute(batch)
    assert tokens(two, [LONG] * 4) == expected


@pytest.fixture(scope="module")
def recovering(settings: EngineSettings) -> Iterator[LLM]:
    """Two stages that are started anew when one is lost."""
    with running(settings, pipeline_parallel_size=2, restart_workers=True) as llm:
        yield llm


def test_what_lost_processes_held_is_computed_again(
    recovering: LLM, expected: list[tuple[int, ...]]
) -> None:
    engine = recovering.engine
    for index, prompt in enumerate(PROMPTS):
        engine.add(str(index), recovering.tokenizer.encode(prompt), LONG)
    given: dict[str, list[int]] = {}
    kills = [(3, 0), (9, 1)]
    for step in range(10_000):
        if kills and step == kills[0][0]:
            os.kill(workers(recovering)[kills.pop(0)[1]].pid, signal.SIGKILL)
        for delta in engine.step():
            assert delta.error is None
            given.setdefault(delta.request_id, []).extend(delta.token_ids)
        engine.scheduler.check_integrity()
        if not engine.has_requests:
            break
    assert not kills
    assert [tuple(given[str(index)]) for index in range(4)] == expected


def test_a_request_that_is_in_every_loss_fails(recovering: LLM) -> None:
    engine = recovering.engine
    engine.add("poison", [5] * 100, LONG)
    deltas = []
    while engine.has_requests:
        os.kill(workers(recovering)[1].pid, signal.SIGKILL)
        deltas += engine.step()
    assert deltas[-1].error is not None
    assert "again and again" in str(deltas[-1].error)


def test_an_idle_loss_is_noticed(settings: EngineSettings) -> None:
    with running(settings, pipeline_parallel_size=2) as own:
        own.engine.tend()
        os.kill(workers(own)[0].pid, signal.SIGKILL)
        with pytest.raises(WorkersLostError, match="rank 0"):
            until(own.engine.tend)


def test_what_was_kept_is_forgotten_with_processes_that_idled(recovering: LLM) -> None:
    prompt = list(range(5, 105))
    engine = recovering.engine
    first = recovering.generate([prompt], LONG)[0].outputs[0].token_ids
    hits = engine.scheduler.prefix_hits
    lost = workers(recovering)[0].pid
    os.kill(lost, signal.SIGKILL)
    while workers(recovering)[0].pid == lost:
        engine.tend()
        time.sleep(0.01)
    assert recovering.generate([prompt], LONG)[0].outputs[0].token_ids == first
    assert engine.scheduler.prefix_hits == hits


def test_a_process_that_cannot_start_says_why(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-network")
    with pytest.raises(WorkersLostError, match=r"rank \d .*failed:\n.*Traceback(.|\n)*no-such"):
        LLM.from_settings(replace(settings, pipeline_parallel_size=2))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(call: Callable[[], object], seconds: float = 10.0) -> None:
    """Call again and again; the test expects it to raise."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        call()
        time.sleep(0.01)

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
from stallfree.core.request import Request
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


@pytest.mark.parametrize(("dtype", "stages"), [("float32", 2), ("float32", 4), ("int8", 4)])
def test_stages_give_what_one_process_gives(tmp_path: Path, dtype: str, stages: int) -> None:
    settings = tiny_settings(tmp_path, num_hidden_layers=4)
    settings = replace(settings, dtype=dtype)
    with running(settings) as one:
        expected = one.generate(PROMPTS, MIXED)
    with running(settings, pipeline_parallel_size=stages) as several:
        given = several.generate(PROMPTS, MIXED)
        assert several.engine.facts.num_parameters == one.engine.facts.num_parameters
    assert [each.outputs[0].token_ids for each in given] == [
        each.outputs[0].token_ids for each in expected
    ]
    assert given[3].prompt_logprobs == expected[3].prompt_logprobs


@pytest.mark.parametrize(("shares", "stages"), [(2, 2), (4, 1)])
def test_shares_give_what_one_process_gives(tmp_path: Path, shares: int, stages: int) -> None:
    settings = tiny_settings(tmp_path)  # two key heads: four shares have two of each
    with running(settings) as one:
        expected = one.generate(PROMPTS, MIXED)
    sizes = {"tensor_parallel_size": shares, "pipeline_parallel_size": stages}
    with running(settings, **sizes) as several:
        given = several.generate(PROMPTS, MIXED)
        assert several.engine.facts.num_parameters == one.engine.facts.num_parameters
    assert [each.outputs[0].token_ids for each in given] == [
        each.outputs[0].token_ids for each in expected
    ]
    ours, theirs = given[3].prompt_logprobs, expected[3].prompt_logprobs
    assert ours is not None
    assert theirs is not None
    for mine, its in zip(ours[1:], theirs[1:], strict=True):
        assert mine is not None
        assert its is not None
        assert mine.logprob == pytest.approx(its.logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"tensor_parallel_size": 3}, "4 query heads"),
        ({"restart_workers": True}, "restart_workers is given, but the model runs in this process"),
        ({"tensor_parallel_size": 2, "dtype": "int8"}, "int8 is not implemented for tensor_par"),
        ({"pipeline_parallel_size": 9}, "pipeline_parallel_size is 9; the model has 2 layers"),
    ],
)
def test_what_cannot_be_split_is_refused(
    tmp_path: Path, sizes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        LLM.from_settings(replace(tiny_settings(tmp_path), **sizes))


@pytest.mark.parametrize("policy", ["sarathi", "vllm", "orca", "faster_transformer"])
def test_preemption_and_aborts_change_no_token(tmp_path: Path, policy: str) -> None:
    settings = replace(tiny_settings(tmp_path), scheduler=policy, token_budget=None)
    with running(settings) as one:
        expected = tokens(one, [LONG] * 4)
    small = {"kv_cache_memory_bytes": 1 << 16} if policy in ("sarathi", "vllm") else {}
    with running(settings, pipeline_parallel_size=2, **small) as two:
        engine = two.engine
        for index, prompt in enumerate(PROMPTS):
            ids = two.tokenizer.encode(prompt)
            engine.add(f"kept {index}", ids, LONG)
            engine.add(f"aborted {index}", ids, LONG)
        given: dict[str, list[int]] = {}
        steps, preempted = 0, False
        while engine.has_requests:
            for delta in engine.step():
                assert delta.error is None
                given.setdefault(delta.request_id, []).extend(delta.token_ids)
            steps += 1
            preempted |= any(each.num_preemptions for each in engine.scheduler.waiting)
            if steps % 5 == 0:
                engine.abort(f"aborted {steps // 5 - 1}")
        engine.scheduler.check_integrity()
        assert preempted == bool(small)
        assert [tuple(given[f"kept {index}"]) for index in range(4)] == expected


def test_a_long_prompt_is_in_several_stages_at_once(tmp_path: Path) -> None:
    with running(tiny_settings(tmp_path), pipeline_parallel_size=2) as two:
        engine = two.engine
        engine.add("long", [5] * 100, GREEDY)
        engine.step()
        (request,) = engine.scheduler.running
        assert request.in_flight == 1  # one of two batches came back
        assert request.num_computed_tokens == 2 * 16


@pytest.mark.parametrize(("rank", "how"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_process_is_named(tmp_path: Path, rank: int, how: signal.Signals) -> None:
    settings = replace(tiny_settings(tmp_path), worker_timeout_s=1.0)
    with running(settings, pipeline_parallel_size=2) as two:
        own = workers(two)
        two.engine.add("long", [5] * 100, LONG)
        two.engine.step()
        os.kill(own[rank].pid, how)
        expected = "ended by SIGKILL" if how is signal.SIGKILL else "has not answered for 1 s"
        with pytest.raises(WorkersLostError, match=rf"rank {rank} \(layers .*{expected}"):
            until(two.engine.step)
        assert all(not alive(worker.pid) for worker in own)


def test_a_batch_that_fails_in_one_stage_fails_alone(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    with running(settings) as one:
        expected = tokens(one, [GREEDY] * 4)
    with running(settings, pipeline_parallel_size=2) as two:
        pipeline = two.engine.executor
        unknown = Request("bad", [10**6], GREEDY, max_tokens=1)
        unknown.block_table = [0]
        batch = Batch([Chunk(unknown, 0, 1, True, False)])
        for _ in range(5):  # the first stage fails, and the second computes zeros
            with pytest.raises(ExecutorError, match=r"rank 0 .*failed:\n(.|\n)*IndexError"):
                pipeline.execute(batch)
        assert tokens(two, [GREEDY] * 4) == expected


def test_what_lost_processes_held_is_computed_again(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    with running(settings) as one:
        expected = tokens(one, [LONG] * 4)
    with running(settings, pipeline_parallel_size=2, restart_workers=True) as two:
        for index, prompt in enumerate(PROMPTS):
            two.engine.add(str(index), two.tokenizer.encode(prompt), LONG)
        given: dict[str, list[int]] = {}
        kills = [(3, 0), (9, 1)]
        for step in range(10_000):
            if kills and step == kills[0][0]:
                os.kill(workers(two)[kills.pop(0)[1]].pid, signal.SIGKILL)
            for delta in two.engine.step():
                assert delta.error is None
                given.setdefault(delta.request_id, []).extend(delta.token_ids)
            two.engine.scheduler.check_integrity()
            if not two.engine.has_requests:
                break
        assert not kills
        assert [tuple(given[str(index)]) for index in range(4)] == expected


def test_a_request_that_is_in_every_loss_fails(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    with running(settings, pipeline_parallel_size=2, restart_workers=True) as two:
        two.engine.add("poison", [5] * 100, LONG)
        deltas = []
        while two.engine.has_requests:
            os.kill(workers(two)[1].pid, signal.SIGKILL)
            deltas += two.engine.step()
        assert deltas[-1].error is not None
        assert "again and again" in str(deltas[-1].error)


def test_an_idle_loss_is_noticed(tmp_path: Path) -> None:
    with running(tiny_settings(tmp_path), pipeline_parallel_size=2) as two:
        two.engine.tend()
        os.kill(workers(two)[0].pid, signal.SIGKILL)
        with pytest.raises(WorkersLostError, match="rank 0"):
            until(two.engine.tend)


def test_a_process_that_cannot_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(tmp_path)
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

"""The engine and its offline and asynchronous faces, on a tiny real model."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from stallfree import LLM, SamplingParams
from stallfree.core.batch import Batch
from stallfree.engine.async_engine import AsyncEngine
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.llm import Prompt
from stallfree.engine.outputs import Delta
from stallfree.engine.settings import EngineSettings
from stallfree.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    EngineStoppedError,
    ExecutorError,
    InvalidRequestError,
)
from stallfree.executor.output import ExecutorOutput

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The quick brown fox", "Die Würde", "alpha beta gamma delta river", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen2", initializer_range=0.2)


@pytest.fixture(scope="module")
def settings(folder: Path) -> EngineSettings:
    return EngineSettings(
        model=str(folder),
        dtype="float32",
        token_budget=16,
        kv_cache_memory_bytes=1 << 20,
        threads=1,
    )


@pytest.fixture
def engine(settings: EngineSettings) -> Engine:
    return build_engine(settings, show_progress=False)


@pytest.fixture
def llm(settings: EngineSettings) -> Iterator[LLM]:
    llm = LLM.from_settings(settings)
    yield llm
    llm.engine.scheduler.check_integrity()
    assert not llm.engine.has_requests
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_blocks


class Failing:
    """An executor whose iterations fail while `fails` says so."""

    def __init__(self, engine: Engine, error: BaseException | None = None) -> None:
        self.executor = engine.executor
        self.error = error or MemoryError("no memory for this batch")
        self.fails = False

    def execute(self, batch: Batch) -> ExecutorOutput:
        if self.fails:
            raise self.error
        return self.executor.execute(batch)


def test_generate_matches_transformers(llm: LLM, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    for output in llm.generate(PROMPTS, GREEDY, use_progress_bar=False):
        ids = torch.tensor([output.prompt_token_ids])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        [completion] = output.outputs
        assert list(completion.token_ids) == expected[0, ids.shape[1] :].tolist()
        assert completion.text == llm.tokenizer.decode(completion.token_ids)
        assert completion.finish_reason == "length"


def test_prompts_come_in_any_form(llm: LLM) -> None:
    [one] = llm.generate("The quick", GREEDY, use_progress_bar=False)
    [same] = llm.generate(list(one.prompt_token_ids), GREEDY, use_progress_bar=False)
    mixed: list[Prompt] = [one.prompt_token_ids, "The quick"]
    two = llm.generate(mixed, [GREEDY] * 2, use_progress_bar=False)
    assert one.outputs == same.outputs == two[0].outputs == two[1].outputs
    assert same.prompt is None
    assert llm.generate([], GREEDY, use_progress_bar=False) == []
    with pytest.raises(InvalidRequestError, match="2 sampling_params for 1 prompts"):
        llm.generate("x", [GREEDY] * 2)


def test_a_bad_prompt_runs_none(llm: LLM) -> None:
    prompts: list[Prompt] = ["x", []]
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate(prompts, GREEDY, use_progress_bar=False)
    assert not llm.engine.has_requests


def test_stream_gives_the_same_text_in_pieces(llm: LLM) -> None:
    [whole] = llm.generate("Die Würde", GREEDY, use_progress_bar=False)
    deltas = list(llm.stream("Die Würde", GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert [delta.finish_reason for delta in deltas] == [None] * 11 + ["length"]
    first = next(stream := llm.stream("x", GREEDY))
    assert first.token_ids
    stream.close()
    assert not llm.engine.has_requests


def test_streams_may_be_read_in_turn(llm: LLM) -> None:
    expected = [each.outputs[0].text for each in llm.generate(PROMPTS, GREEDY)]
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS]
    texts = ["" for _ in PROMPTS]
    for deltas in zip(*streams, strict=True):
        texts = [text + delta.text for text, delta in zip(texts, deltas, strict=True)]
    assert texts == expected


def test_outputs_come_as_they_are_complete(llm: LLM) -> None:
    params = [dataclasses.replace(GREEDY, max_tokens=count) for count in (9, 3, 6)]
    outputs = list(llm.as_completed(["x"] * 3, params))
    assert [index for index, _ in outputs] == [1, 2, 0]
    assert [len(output.outputs[0].token_ids) for _, output in outputs] == [3, 6, 9]


def test_seeds_repeat_whatever_runs_beside(llm: LLM) -> None:
    random = dataclasses.replace(GREEDY, temperature=1.0, seed=5)
    [alone] = llm.generate("The quick", random, use_progress_bar=False)
    others = [dataclasses.replace(random, seed=None)] * 5
    together = llm.generate(["The quick"] * 6, [*others, random], use_progress_bar=False)
    assert together[-1].outputs == alone.outputs
    assert len({output.outputs[0].token_ids for output in together}) > 3


def test_completions_of_one_prompt_differ_and_share_it(llm: LLM) -> None:
    prompt = list(range(40, 140))
    params = dataclasses.replace(GREEDY, temperature=1.0, seed=3, n=3, prompt_logprobs=0)
    [output] = llm.generate([prompt], params, use_progress_bar=False)
    assert [each.index for each in output.outputs] == [0, 1, 2]
    assert len({each.token_ids for each in output.outputs}) == 3
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 100
    [again] = llm.generate([prompt], params, use_progress_bar=False)
    assert again == output


def test_stop_strings_end_the_text_before_them(llm: LLM) -> None:
    [free] = llm.generate("alpha beta", GREEDY, use_progress_bar=False)
    text = free.outputs[0].text
    stop = text[len(text) // 2 :][:3]
    params = dataclasses.replace(GREEDY, stop=(stop, "never this"))
    [stopped] = llm.generate("alpha beta", params, use_progress_bar=False)
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].stop_reason == stop
    patient = dataclasses.replace(params, min_tokens=12)
    assert llm.generate("alpha beta", patient, use_progress_bar=False)[0].outputs[0].text == text


def test_stop_tokens_add_no_text(llm: LLM) -> None:
    [free] = llm.generate("alpha beta", GREEDY, use_progress_bar=False)
    token = free.outputs[0].token_ids[5]
    first = free.outputs[0].token_ids.index(token)
    params = dataclasses.replace(GREEDY, stop_token_ids=(token,))
    [stopped] = llm.generate("alpha beta", params, use_progress_bar=False)
    assert stopped.outputs[0].token_ids == free.outputs[0].token_ids[: first + 1]
    assert stopped.outputs[0].stop_reason == token
    assert stopped.outputs[0].text == llm.tokenizer.decode(free.outputs[0].token_ids[:first])


def test_end_tokens_end_unless_ignored(llm: LLM) -> None:
    end = max(llm.engine.end_token_ids)
    params = SamplingParams(temperature=0, max_tokens=5, logit_bias={end: 100.0})
    [output] = llm.generate("x", params, use_progress_bar=False)
    assert output.outputs[0].token_ids == (end,)
    assert output.outputs[0].text == ""
    assert output.outputs[0].finish_reason == "stop"
    ignoring = dataclasses.replace(params, ignore_eos=True)
    [output] = llm.generate("x", ignoring, use_progress_bar=False)
    assert output.outputs[0].token_ids == (end,) * 5


@pytest.mark.parametrize("budget", [1, 5, 64])
def test_logprobs_match_transformers(settings: EngineSettings, folder: Path, budget: int) -> None:
    llm = LLM.from_settings(dataclasses.replace(settings, token_budget=budget))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    params = dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=2)
    [output] = llm.generate("alpha beta gamma delta", params, use_progress_bar=False)
    tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    assert output.prompt_logprobs[0] is None
    positions = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    for row, position, token in zip(expected, positions, tokens[1:], strict=False):
        assert position is not None
        assert position.token_id == token
        assert position.logprob == pytest.approx(float(row[token]), abs=1e-3)
        best = row.topk(len(position.top))
        assert [token for token, _ in position.top] == best.indices.tolist()
    assert len(positions[-1].top if positions[-1] else ()) == 3


@pytest.mark.parametrize(
    ("prompt", "params", "match"),
    [
        ([], {}, "the prompt is empty"),
        ([512], {}, "token id 512; the vocabulary is 0 to 511"),
        ([-1], {}, "token id -1"),
        ([1], {"logit_bias": {512: 1.0}}, "logit_bias holds token id 512"),
        ([1], {"stop_token_ids": (9999,)}, "stop_token_ids holds token id 9999"),
        ([1] * 100, {"max_tokens": 2000}, "max_tokens can be"),
        ([1] * 4000, {}, "the prompt has 4000 tokens"),
    ],
)
def test_bad_requests_are_refused(
    engine: Engine, prompt: list[int], params: dict[str, Any], match: str
) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        engine.add("bad", prompt, SamplingParams(**params))
    assert not engine.has_requests


def test_max_tokens_none_runs_to_the_end_of_the_context(settings: EngineSettings) -> None:
    llm = LLM.from_settings(dataclasses.replace(settings, max_model_len=40))
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    [output] = llm.generate([list(range(30))], params, use_progress_bar=False)
    assert len(output.outputs[0].token_ids) == 10
    with pytest.raises(ContextLengthError, match="context is 40"):
        llm.generate([list(range(40))], params)


def test_a_failed_iteration_fails_its_requests_only(engine: Engine) -> None:
    failing = Failing(engine)
    engine.executor = failing
    engine.add("first", [1, 2, 3], GREEDY)
    engine.step()
    failing.fails = True
    [delta] = engine.step()
    assert delta.finish_reason == "error"
    assert "MemoryError: no memory for this batch" in str(delta.error)
    failing.fails = False
    engine.add("second", [1, 2, 3], GREEDY)
    deltas: list[Delta] = []
    while engine.has_requests:
        deltas += engine.step()
    assert [delta.request_id for delta in deltas] == ["second"] * 12
    engine.scheduler.check_integrity()


def test_a_row_that_cannot_be_sampled_fails_alone(engine: Engine) -> None:
    """Stop tokens and `min_tokens` that together forbid every token, beside another request."""
    engine.end_token_ids = frozenset(range(engine.vocab_size))
    engine.add("victim", [1, 2, 3], GREEDY)
    engine.add("silent", [1, 2, 3], dataclasses.replace(GREEDY, ignore_eos=False, min_tokens=2))
    deltas: list[Delta] = []
    while engine.has_requests:
        deltas += engine.step()
    [silent] = [delta for delta in deltas if delta.request_id == "silent"]
    assert silent.finish_reason == "error"
    assert "not finite" in str(silent.error)
    victim = [delta for delta in deltas if delta.request_id == "victim"]
    assert [delta.finish_reason for delta in victim] == [None] * 11 + ["length"]
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("scheduler", ["sarathi", "faster_transformer"])
def test_an_interrupt_leaves_a_usable_engine(settings: EngineSettings, scheduler: str) -> None:
    llm = LLM.from_settings(dataclasses.replace(settings, scheduler=scheduler))
    expected = llm.generate(PROMPTS, GREEDY)
    failing = Failing(llm.engine, KeyboardInterrupt())
    llm.engine.executor = failing
    failing.fails = True
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    failing.fails = False
    assert not llm.engine.has_requests
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_blocks
    assert llm.generate(PROMPTS, GREEDY) == expected


def test_offline_failures_raise(llm: LLM) -> None:
    failing = Failing(llm.engine)
    failing.fails = True
    llm.engine.executor = failing
    with pytest.raises(ExecutorError, match="no memory"):
        llm.generate(PROMPTS, GREEDY, use_progress_bar=False)


def test_a_stuck_scheduler_is_never_silent(engine: Engine) -> None:
    engine.add("one", [1, 2], GREEDY)
    engine.scheduler.policy = dataclasses.replace(engine.scheduler.policy, propose=lambda view: [])
    with pytest.raises(EngineError, match="stuck"):
        engine.step()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kv_cache_memory_bytes": 100}, "one block of 16 tokens takes"),
        ({"kv_cache_memory_bytes": 1 << 60, "max_num_seqs": 1 << 40}, "are free on cpu"),
        ({"device": "meta"}, "must be one of auto, cpu, cuda"),
        ({"max_model_len": 2049}, "longest context is 2048"),
        (
            {"max_model_len": 2048, "kv_cache_memory_bytes": 1 << 19},
            "raise kv_cache_memory to at least 1048576",
        ),
        ({"device": "cuda"}, "cannot be used here"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: EngineSettings, change: dict[str, Any], match: str
) -> None:
    changed = dataclasses.replace(settings, **change)
    with pytest.raises(ConfigError, match=match):
        build_engine(changed, show_progress=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_where_it_is_native(settings: EngineSettings, dtype: str) -> None:
    changed = dataclasses.replace(settings, dtype=dtype)
    capabilities = torch.cpu.get_capabilities()
    names = {"bfloat16": ("avx512_bf16", "amx_bf16", "bf16")}
    native = names.get(dtype, ("avx512_fp16", "amx_fp16", "fp16_arith"))
    if not any(capabilities.get(name, False) for name in native):
        with pytest.raises(ConfigError, match=f"{dtype} has no native arithmetic"):
            build_engine(changed, show_progress=False)
        return
    llm = LLM.from_settings(changed)
    exact = LLM.from_settings(settings)
    [half] = llm.generate("The quick brown fox", GREEDY)
    [full] = exact.generate("The quick brown fox", GREEDY)
    assert llm.engine.facts.kv_cache_bytes == exact.engine.facts.kv_cache_bytes
    assert llm.engine.facts.kv_cache_tokens == 2 * exact.engine.facts.kv_cache_tokens
    assert half.outputs[0].token_ids[0] == full.outputs[0].token_ids[0]


def test_the_context_shrinks_to_what_the_cache_holds(settings: EngineSettings) -> None:
    for scheduler in ("sarathi", "orca"):
        changed = dataclasses.replace(settings, scheduler=scheduler, kv_cache_memory_bytes=1 << 18)
        engine = build_engine(changed, show_progress=False)
        assert engine.max_model_len == engine.facts.kv_cache_tokens == 512


async def collect(engine: AsyncEngine, name: str, params: SamplingParams = GREEDY) -> list[Delta]:
    return [delta async for delta in engine.generate(name, [5, 6, 7], params) if delta is not None]


def test_async_streams_run_together_and_drain(engine: Engine) -> None:
    async def main() -> None:
        own = AsyncEngine(engine)
        own.start()
        both = dataclasses.replace(GREEDY, n=2)
        lists = await asyncio.gather(*(collect(own, str(i), both) for i in range(5)))
        assert all(sum(d.finish_reason == "length" for d in deltas) == 2 for deltas in lists)
        with pytest.raises(InvalidRequestError):
            await anext(own.generate("bad", [], GREEDY))
        running = asyncio.create_task(collect(own, "late"))
        await asyncio.sleep(0)
        assert await own.drain(30)
        assert len(await running) == 12
        with pytest.raises(EngineStoppedError, match="shutting down"):
            await collect(own, "too late")
        own.stop()

    asyncio.run(main())
    engine.scheduler.check_integrity()


def test_closing_a_stream_aborts_its_request(engine: Engine) -> None:
    async def main() -> None:
        own = AsyncEngine(engine)
        own.start()
        long = dataclasses.replace(GREEDY, max_tokens=1000)
        stream = own.generate("gone", [1, 2, 3], long)
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(collect(own, "cancelled", long))
        while not own.num_running + own.num_waiting:
            await asyncio.sleep(0.001)
        task.cancel()
        for _ in range(2000):
            if not engine.has_requests:
                break
            await asyncio.sleep(0.001)
        assert not engine.has_requests
        own.stop()

    asyncio.run(main())
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


def test_a_drain_that_takes_too_long_ends_what_runs(engine: Engine) -> None:
    async def main() -> None:
        own = AsyncEngine(engine)
        own.start()
        long = dataclasses.replace(GREEDY, max_tokens=1000, n=2)
        task = asyncio.create_task(collect(own, "long", long))
        await asyncio.sleep(0.05)
        assert not await own.drain(0)
        deltas = await task
        assert sorted(d.index for d in deltas if d.finish_reason == "abort") == [0, 1]
        own.stop()

    asyncio.run(main())


def test_stopping_ends_streams_and_ids_are_not_shared(engine: Engine) -> None:
    async def main() -> None:
        own = AsyncEngine(engine)
        own.start()
        long = dataclasses.replace(GREEDY, max_tokens=1000)
        task = asyncio.create_task(collect(own, "same", long))
        await asyncio.sleep(0.02)
        with pytest.raises(InvalidRequestError, match="'same' is in use"):
            await collect(own, "same")
        await asyncio.to_thread(own.stop)
        assert (await asyncio.wait_for(task, 10))[-1].finish_reason == "abort"

    asyncio.run(main())


def test_a_dead_engine_says_so(engine: Engine) -> None:
    deaths: list[BaseException] = []

    async def main() -> None:
        own = AsyncEngine(engine)
        own.on_death = deaths.append
        own.start()
        engine.scheduler.policy = dataclasses.replace(
            engine.scheduler.policy, propose=lambda view: []
        )
        [delta] = await collect(own, "victim")
        assert delta.finish_reason == "error"
        assert "stuck" in str(delta.error)
        with pytest.raises(EngineStoppedError, match="died"):
            await collect(own, "next")
        own.stop()

    asyncio.run(main())
    assert len(deaths) == 1

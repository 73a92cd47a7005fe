"""The engine on a tiny real model: what it refuses, and what it survives."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from engine_fixtures import GREEDY, Failing, tiny_settings

from stallfree import LLM, SamplingParams
from stallfree.core.blocks import IntegrityError
from stallfree.core.request import Request
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.outputs import Delta
from stallfree.engine.settings import EngineSettings
from stallfree.engine.tokenizer import Tokenizer
from stallfree.errors import ConfigError, EngineError, InvalidRequestError


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return tiny_settings(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(settings: EngineSettings) -> Engine:
    return build_engine(settings, show_progress=False)


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


def test_a_stuck_scheduler_is_never_silent(engine: Engine) -> None:
    engine.add("one", [1, 2], GREEDY)
    engine.scheduler.policy = dataclasses.replace(engine.scheduler.policy, propose=lambda view: [])
    with pytest.raises(EngineError, match="stuck"):
        engine.step()


def test_completions_of_a_prompt_are_added_together_or_not_at_all(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = engine.scheduler.add
    added: list[Request] = []

    def add_two(request: Request) -> None:
        if len(added) == 2:
            raise RuntimeError("the third one fails")
        added.append(request)
        add(request)

    monkeypatch.setattr(engine.scheduler, "add", add_two)
    three = dataclasses.replace(GREEDY, n=3)
    with pytest.raises(RuntimeError, match="third"):
        engine.add("several", [1, 2, 3], three)
    assert len(added) == 2
    assert not engine.has_requests
    monkeypatch.undo()
    engine.add("several", [1, 2, 3], three)
    deltas: list[Delta] = []
    while engine.has_requests:
        deltas += engine.step()
    assert [delta.finish_reason for delta in deltas].count("length") == 3
    engine.scheduler.check_integrity()


def test_a_text_that_cannot_be_made_fails_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_bytes = Tokenizer.token_bytes
    engine.add("other", [1, 2, 3], GREEDY)
    engine.add("struck", [1, 2, 3], dataclasses.replace(GREEDY, logit_bias={5: 100.0}))

    def fails_on_5(self: Tokenizer, token_id: int) -> bytes:
        if token_id == 5:
            raise RuntimeError("no such token")
        return token_bytes(self, token_id)

    monkeypatch.setattr(Tokenizer, "token_bytes", fails_on_5)
    deltas: list[Delta] = []
    while engine.has_requests:
        deltas += engine.step()
    [struck] = [delta for delta in deltas if delta.request_id == "struck"]
    assert struck.finish_reason == "error"
    assert "RuntimeError: no such token" in str(struck.error)
    assert [delta.finish_reason for delta in deltas].count("length") == 1
    engine.scheduler.check_integrity()


def test_a_lost_block_is_noticed_once_the_engine_idles(engine: Engine) -> None:
    engine.add("one", [1, 2, 3], GREEDY)
    while engine.has_requests:
        engine.step()
    engine.tend()
    engine.scheduler.pool.allocate(1)
    engine.tend()  # nothing ran since it looked
    engine.add("two", [1, 2, 3], GREEDY)
    while engine.has_requests:
        engine.step()
    with pytest.raises(IntegrityError, match="1 holders counted, 0 found"):
        engine.tend()


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

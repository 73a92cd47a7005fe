"""int8 weights: rounding, a cache that can be lost, answers near those of float32."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_model

from stallfree import LLM, SamplingParams
from stallfree.errors import ConfigError, WeightFileError
from stallfree.model.int8 import is_supported, quantize_rows, weight_levels
from stallfree.model.int8_cache import HeldWeights, int8_weights
from stallfree.model.weight_reader import SCALES
from stallfree.model.weights import SafetensorsWeights

pytestmark = pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU")


def test_rows_are_rounded_to_the_nearest_level() -> None:
    weight = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    values, scales = quantize_rows(weight)
    assert values.dtype == torch.int8
    assert int(values.abs().max()) == 127
    is_cut = weight.abs() > 127 * scales[:, None]
    errors = (values * scales[:, None] - weight).abs()
    assert (errors[~is_cut] <= scales[:, None].expand_as(errors)[~is_cut] / 2 + 1e-6).all()
    assert (values.abs()[is_cut] == 127).all()


@pytest.mark.parametrize("levels", [63, 127])
def test_no_scale_of_those_tried_is_better(levels: int) -> None:
    """One row has a weight far from the rest: cutting it would cost more than it brings."""
    weight = torch.randn(9, 500, generator=torch.Generator().manual_seed(0))
    weight[4, 7] = 100.0
    values, scales = quantize_rows(weight, levels)
    errors = (values * scales[:, None] - weight).square().sum(dim=1)
    most = weight.abs().amax(dim=1)
    for share in (1.0, 0.95, 0.9, 0.85, 0.8):
        tried = (most * share / levels)[:, None]
        cut = (weight / tried).round().clamp(-levels, levels) * tried
        assert (errors <= (cut - weight).square().sum(dim=1) * 1.0001).all()
    assert values[4, 7] == levels
    assert scales[4] * levels == pytest.approx(100.0)


def test_the_cache_is_used_remade_and_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_model(tmp_path / "model", "qwen2")
    cache = tmp_path / "cache"
    monkeypatch.setenv("STALLFREE_CACHE", str(cache))
    source = SafetensorsWeights(folder)
    first = int8_weights(folder, source)
    name = "model.layers.0.mlp.up_proj.weight"
    assert first.tensor(name).dtype == torch.int8
    assert first.tensor(name + SCALES).shape == (128,)
    assert first.tensor("model.norm.weight").dtype == torch.float32
    [file] = cache.glob("int8/*/model.safetensors")
    again = int8_weights(folder, HeldWeights({}))  # nothing is read from the source
    assert torch.equal(again.tensor(name), first.tensor(name))
    file.write_bytes(file.read_bytes()[:-10])
    remade = int8_weights(folder, source)
    assert torch.equal(remade.tensor(name), first.tensor(name))
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("STALLFREE_CACHE", str(blocked))
    held = int8_weights(folder, source)
    assert torch.equal(held.tensor(name), first.tensor(name))
    with pytest.raises(WeightFileError, match="no weight x"):
        held.tensor("x")


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "mistral", "qwen3"])
def test_a_model_in_int8_answers_nearly_as_in_float32(tmp_path: Path, architecture: str) -> None:
    folder = save_tiny_model(tmp_path, architecture, initializer_range=0.2)
    prompt = list(range(100, 140))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scores = []
    for dtype in ("float32", "int8"):
        llm = LLM(str(folder), dtype=dtype, kv_cache_memory_bytes=1 << 20)
        [output] = llm.generate([prompt], params)
        assert output.prompt_logprobs is not None
        scores.append(torch.tensor([p.logprob for p in output.prompt_logprobs if p is not None]))
        assert llm.engine.facts.dtype == dtype
    assert (scores[0] - scores[1]).abs().mean() < 0.1 * 127 / weight_levels()


def test_int8_is_the_default_and_float32_a_choice(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path, "llama"))
    for dtype, expected in (("auto", "int8"), ("float32", "float32")):
        llm = LLM(folder, dtype=dtype, kv_cache_memory_bytes=1 << 20)
        assert llm.engine.facts.dtype == expected


@pytest.mark.parametrize(
    ("architecture", "shape", "obstacle"),
    [
        ("falcon", {}, "attention and MLP in parallel"),
        ("mixtral", {"num_local_experts": 4}, "a mixture of experts"),
        ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
    ],
)
def test_a_model_that_the_kernels_cannot_run_is_run_in_float32(
    tmp_path: Path,
    architecture: str,
    shape: dict[str, Any],
    obstacle: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = str(save_tiny_model(tmp_path, architecture, **shape))
    llm = LLM(folder, kv_cache_memory_bytes=1 << 20)
    assert llm.engine.facts.dtype == "float32"
    [message] = [record.message for record in caplog.records if "int8" in record.message]
    assert re.search(f"int8 is not implemented for .*{obstacle}.*float32", message)
    output = llm.generate(["The quick"], SamplingParams(temperature=0, max_tokens=4))
    assert len(output[0].outputs[0].token_ids) > 0
    with pytest.raises(ConfigError, match=f"{obstacle}.*use --dtype auto"):
        LLM(folder, dtype="int8", kv_cache_memory_bytes=1 << 20)


def test_without_the_kernels_the_default_is_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("stallfree.engine.arithmetic.is_int8_supported", lambda: False)
    folder = str(save_tiny_model(tmp_path, "llama"))
    llm = LLM(folder, kv_cache_memory_bytes=1 << 20)
    assert llm.engine.facts.dtype == "float32"
    assert "float32, several times slower" in caplog.text
    with pytest.raises(ConfigError, match="int8 needs an x86-64 CPU"):
        LLM(folder, dtype="int8", kv_cache_memory_bytes=1 << 20)


def test_settings_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path, "llama"))
    with pytest.raises(ConfigError, match=r"block_size is 24.*multiple of 16"):
        LLM(folder, block_size=24)
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'bfloat16'"):
        LLM(folder, dtype="float32", kv_cache_dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16"])
def test_the_facts_name_the_memory_that_the_kv_cache_takes(
    tmp_path: Path, kv_cache_dtype: str
) -> None:
    folder = str(save_tiny_model(tmp_path, "qwen3", head_dim=20))  # values are padded to 32
    llm = LLM(folder, kv_cache_dtype=kv_cache_dtype, kv_cache_memory_bytes=1 << 20)
    cache = llm.engine.executor.cache  # type: ignore[attr-defined]
    assert llm.engine.facts.kv_cache_bytes == cache.keys.nbytes + cache.values.nbytes
    assert str(cache.keys.dtype) == f"torch.{kv_cache_dtype}"

"""int8 weights: exact sums, rows that do not see each other, a cache that can be lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_tiny_model

from stallfree import LLM, SamplingParams
from stallfree.errors import WeightFileError
from stallfree.model.int8 import Int8Embedding, Int8Linear, is_supported, quantize_rows
from stallfree.model.int8_cache import SCALES, HeldWeights, int8_weights
from stallfree.model.weights import SafetensorsWeights

pytestmark = pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU")

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def test_rows_are_rounded_to_the_nearest_level() -> None:
    weight = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    values, scales = quantize_rows(weight)
    assert values.dtype == torch.int8
    assert int(values.abs().max()) == 127
    assert ((values * scales[:, None] - weight).abs() <= scales[:, None] / 2 + 1e-6).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(0, 100), st.sampled_from([(64, 33), (896, 40)]))
def test_a_row_is_the_same_in_any_batch(rows: int, seed: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    inner, outer = shape
    values, scales = quantize_rows(torch.randn(outer, inner, generator=generator))
    linear = Int8Linear(values, scales, torch.randn(outer, generator=generator))
    x = torch.randn(rows, inner, generator=generator)
    together = linear(x)
    for row in range(0, rows, 7):
        assert torch.equal(linear(x[row : row + 1])[0], together[row])
    split = rows // 2 + 1
    assert torch.equal(torch.cat([linear(x[:split]), linear(x[split:])]), together)


def test_sums_are_exact_for_the_worst_case() -> None:
    """All activations and weights at their largest: 16-bit sums of pairs would overflow."""
    linear = Int8Linear(torch.full((8, 512), 127, dtype=torch.int8), torch.ones(8))
    assert torch.allclose(linear(torch.ones(3, 512)), torch.full((3, 8), 512 * 127.0))


def test_it_approximates_the_float_layer() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 256, generator=generator)
    bias = torch.randn(64, generator=generator)
    x = torch.randn(5, 256, generator=generator)
    x[2] = 0
    expected = x @ weight.T + bias
    error = (Int8Linear(*quantize_rows(weight), bias)(x) - expected).norm() / expected.norm()
    assert error < 0.02


def test_embedding_gives_rows_back() -> None:
    weight = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    values, scales = quantize_rows(weight)
    rows = Int8Embedding(values, scales)(torch.tensor([4, 4, 0]))
    assert torch.equal(rows, (values.float() * scales[:, None])[[4, 4, 0]])


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
    assert (scores[0] - scores[1]).abs().mean() < 0.1
    assert llm.engine.facts.weight_bytes < 1.1 * llm.engine.facts.num_parameters

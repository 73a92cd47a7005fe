"""The configuration that a GGUF file gives, and what is missing, contradictory or unsupported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import byte_level_vocabulary, state_dict, write_gguf

from stallfree.errors import UnsupportedModelError, WeightFileError
from stallfree.model.config import ModelConfig
from stallfree.model.demo import assemble
from stallfree.model.gguf import GgufWeights
from stallfree.model.rope_config import RopeConfig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def test_the_configuration(path: Path) -> None:
    config = GgufWeights(write_gguf(path, "qwen3")).hf_config
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["head_dim"] == 16
    assert config["num_key_value_heads"] == 2
    assert config["rope_theta"] == 50_000.0
    assert config["rope_scaling"] is None
    assert config["attention_bias"] is False
    assert config["sliding_window"] is None


def test_defaults_of_the_configuration(path: Path) -> None:
    without = (
        "llama.rope.freq_base",
        "llama.rope.dimension_count",
        "llama.attention.key_length",
        "llama.attention.value_length",
    )
    config = GgufWeights(write_gguf(path, without=without)).hf_config
    assert config["rope_theta"] == 10_000.0
    assert config["head_dim"] == 16


@pytest.mark.parametrize("factors", [[1.0] * 7, [1.0] * 7 + [0.0], [1.0] * 7 + [float("nan")]])
def test_rope_factors_that_are_none(path: Path, factors: list[float]) -> None:
    tensor = np.array(factors, np.float32)
    with pytest.raises(WeightFileError, match="rope_freqs"):
        GgufWeights(write_gguf(path, tensors={"rope_freqs.weight": tensor}))


@pytest.mark.parametrize(
    ("extra", "scaling"),
    [
        ({"rope.scaling.type": "none"}, None),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 16.0,
            },
        ),
    ],
)
def test_rope_scaling(path: Path, extra: dict[str, Any], scaling: Any) -> None:
    write_gguf(path, extra={f"llama.{key}": value for key, value in extra.items()})
    assert GgufWeights(path).hf_config["rope_scaling"] == scaling


def test_rope_factors_of_llama3(path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    weights = GgufWeights(write_gguf(path, tensors={"rope_freqs.weight": factors}))
    assert weights.hf_config["rope_scaling"] == {
        "rope_type": "freq_factors",
        "factors": factors.tolist(),
    }
    assert weights.names() == state_dict("llama").keys()


def test_a_sliding_window_makes_llama_mistral(path: Path) -> None:
    config = GgufWeights(write_gguf(path, extra={"llama.attention.sliding_window": 64})).hf_config
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 64


def test_the_configuration_of_gemma3(path: Path) -> None:
    extra = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    config = GgufWeights(write_gguf(path, "gemma3", extra=extra)).hf_config
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["sliding_window"] == 8
    assert config["query_pre_attn_scalar"] == 16
    shape = ModelConfig.from_hf(config)
    assert shape.activation == "gelu_pytorch_tanh"
    assert shape.rope.theta == 50_000.0
    assert shape.rope.parameters == {"factor": 8.0}
    assert shape.window_rope == RopeConfig(10_000.0)
    assert shape.max_context == 512  # the scaling is in it


@pytest.mark.parametrize("count", [2, 2**31 - 1])
def test_experts_that_are_not_there(path: Path, count: int) -> None:
    weights = state_dict("mixtral")
    extra = {"llama.expert_count": count, "llama.expert_used_count": 2}
    with pytest.raises(WeightFileError, match=f"expert_count is {count}.*\\(3, 96, 64\\)"):
        GgufWeights(write_gguf(path, weights=weights, extra=extra))


def test_end_tokens(path: Path) -> None:
    weights = GgufWeights(write_gguf(path, extra=byte_level_vocabulary()))
    tokens = byte_level_vocabulary()["tokenizer.ggml.tokens"]
    assert {tokens[i] for i in weights.end_token_ids} == {"<|endoftext|>", "<|im_end|>"}


@pytest.mark.parametrize(
    ("architecture", "extra", "match"),
    [
        ("gemma4", {}, r"'gemma4'.*llama, qwen2, qwen3, gemma3"),
        ("qwen2", {"qwen2.expert_count": 8}, "mixture of experts"),
        ("llama", {"split.count": 3}, "merge them"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, "'longrope'.*none, linear, yarn"),
        ("llama", {"llama.rope.dimension_count": 8}, "dimension_count is 8"),
        ("llama", {"llama.attention.value_length": 8}, "value_length is 8"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    path: Path, architecture: str, extra: dict[str, Any], match: str
) -> None:
    weights = state_dict("llama")
    with pytest.raises(UnsupportedModelError, match=match):
        GgufWeights(write_gguf(path, architecture, weights=weights, extra=extra))


def test_a_tensor_without_use_is_refused(path: Path) -> None:
    extra = {"blk.0.attn_sub_norm.weight": np.ones(64, np.float32)}
    with pytest.raises(UnsupportedModelError, match="attn_sub_norm"):
        GgufWeights(write_gguf(path, tensors=extra))
    extra = {"blk.7.attn_norm.weight": np.ones(64, np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"blk\.7"):
        GgufWeights(write_gguf(path, tensors=extra))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 0),
        ("block_count", 2**31),
        ("block_count", 1000),
        ("block_count", 3),
        ("block_count", "two"),
        ("embedding_length", 128),
        ("embedding_length", 2**32 - 1),
        ("feed_forward_length", 95),
        ("attention.head_count", 0),
        ("attention.head_count", 3),
        ("attention.head_count_kv", 3),
        ("attention.head_count_kv", [2, 2]),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("rope.freq_base", -1.0),
        ("rope.freq_base", float("inf")),
    ],
)
def test_metadata_that_contradicts_the_tensors(path: Path, key: str, value: Any) -> None:
    write_gguf(path, extra={f"llama.{key}": value})
    with pytest.raises(WeightFileError):
        GgufWeights(path)


@pytest.mark.parametrize(
    "missing",
    [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "token_embd.weight",
        "output_norm.weight",
        "blk.1.ffn_up.weight",
    ],
)
def test_what_is_missing_is_named(path: Path, missing: str) -> None:
    name = "mlp.up_proj.weight" if "ffn_up" in missing else missing
    name = "model.norm.weight" if missing == "output_norm.weight" else name
    with pytest.raises(WeightFileError, match=name):
        GgufWeights(write_gguf(path, without=[missing]))


def test_a_file_without_an_architecture(path: Path) -> None:
    data = write_gguf(path).read_bytes()
    path.write_bytes(data.replace(b"general.architecture", b"general.architectur_"))
    with pytest.raises(WeightFileError, match=r"general\.architecture"):
        GgufWeights(path)


@pytest.mark.model
def test_the_configuration_of_the_demo_model() -> None:
    weights = GgufWeights(assemble())
    config = weights.hf_config
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert (config["vocab_size"], config["hidden_size"]) == (151_936, 896)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (14, 2)
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (24, 4864)
    assert (config["head_dim"], config["rope_theta"]) == (64, 1e6)
    assert config["max_position_embeddings"] == 32_768
    assert weights.end_token_ids == {151_643, 151_645}

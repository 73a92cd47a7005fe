"""What the configurations of published models mean, and what of an architecture is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model

from stallfree.errors import ModelError, UnsupportedModelError
from stallfree.model.architectures import ARCHITECTURES
from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.layer_weights import layer_weights, weight_shapes
from stallfree.model.rope_config import RopeConfig
from stallfree.model.weights import SafetensorsWeights, read_json

# What the config.json of these models says of their shape.
FALCON_7B: dict[str, Any] = {
    "architectures": ["FalconForCausalLM"],
    "alibi": False,
    "bias": False,
    "hidden_size": 4544,
    "layer_norm_epsilon": 1e-05,
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "vocab_size": 65024,
}
FALCON_180B = {
    **FALCON_7B,
    "hidden_size": 14848,
    "new_decoder_architecture": True,
    "num_attention_heads": 232,
    "num_hidden_layers": 80,
    "num_kv_heads": 8,
}
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
GEMMA_3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
GEMMA_3_4B: dict[str, Any] = {  # which also sees; much is left to defaults
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


def num_parameters(config: ModelConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in weight_shapes(config).values())


@pytest.mark.parametrize(
    ("published", "billions"),
    [
        (FALCON_7B, 7.217 - 0.295),  # the output layer, which is the embedding, counts once
        (FALCON_180B, 179.522 - 0.965),
        (MIXTRAL_8X7B, 46.70),
        (GEMMA_3_1B, 1.00),
        (GEMMA_3_4B, 3.88),
    ],
)
def test_published_models_have_their_number_of_parameters(
    published: dict[str, Any], billions: float
) -> None:
    count = num_parameters(ModelConfig.from_hf(published))
    assert count / 1e9 == pytest.approx(billions, abs=0.005)


def test_falcon_shares_a_norm_or_has_two() -> None:
    small, large = ModelConfig.from_hf(FALCON_7B), ModelConfig.from_hf(FALCON_180B)
    assert small.is_parallel
    assert (small.num_kv_heads, large.num_kv_heads) == (1, 8)
    assert layer_weights(small, 3).mlp_norm is None
    norm = layer_weights(large, 3).mlp_norm
    assert norm is not None
    assert norm.name == "transformer.h.3.ln_mlp"
    assert large.intermediate_size == 4 * 14848
    assert large.tie_embeddings


def test_layers_of_gemma3_are_local_but_for_one_in_six() -> None:
    config = ModelConfig.from_hf(GEMMA_3_1B)
    assert config.sliding_windows[:7] == (512, 512, 512, 512, 512, None, 512)
    assert config.ropes == (RopeConfig(1_000_000.0), RopeConfig(10_000.0))
    assert [config.rope_number(layer) for layer in range(7)] == [1, 1, 1, 1, 1, 0, 1]
    assert config.query_scale == 1 / 16


def test_gemma3_counts_the_scaling_in_its_longest_context() -> None:
    config = ModelConfig.from_hf(GEMMA_3_4B)
    assert config.max_context == 131_072
    assert config.rope.parameters == {"factor": 8.0}
    assert config.num_heads == 8


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({**FALCON_7B, "alibi": True}, "ALiBi"),
        ({**GEMMA_3_1B, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({**GEMMA_3_1B, "final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({**GEMMA_3_1B, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({**GEMMA_3_1B, "rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({**MIXTRAL_8X7B, "hidden_act": "relu"}, "'relu'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize(
    "config",
    [
        {**FALCON_7B, "num_attention_heads": None},
        {**FALCON_180B, "num_kv_heads": 7},
        {**FALCON_7B, "layer_norm_epsilon": -1},
        {**MIXTRAL_8X7B, "num_local_experts": 0},
        {**MIXTRAL_8X7B, "num_local_experts": 10**9},
        {**MIXTRAL_8X7B, "num_experts_per_tok": 9},
        {**GEMMA_3_1B, "sliding_window_pattern": 0},
        {**GEMMA_3_1B, "num_hidden_layers": 10**12},
        {**GEMMA_3_1B, "query_pre_attn_scalar": 0},
        {**GEMMA_3_1B, "rope_parameters": [1]},
        {**GEMMA_3_1B, "rope_parameters": {"full_attention": [1]}},
        {**GEMMA_3_1B, "rope_parameters": {"sliding_attention": "x"}},
        {**GEMMA_3_1B, "rope_scaling": {"rope_type": "linear", "factor": 0}},
        {**GEMMA_3_4B, "text_config": None},
        {**GEMMA_3_4B, "text_config": {"hidden_size": 2560}},
    ],
)
def test_values_that_make_no_sense_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        ModelConfig.from_hf(config)


def test_all_architectures_can_be_loaded_with_the_weights_they_say_they_have(
    tmp_path: Path,
) -> None:
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 50,
    }
    for name in ARCHITECTURES:
        config = ModelConfig.from_hf({"architectures": [name], **small, "text_config": small})
        shapes = weight_shapes(config)
        save_file(
            {each: torch.zeros(shape) for each, shape in shapes.items()},
            tmp_path / "model.safetensors",
        )
        decoder = Decoder(config, SafetensorsWeights(tmp_path), max_positions=64)
        assert decoder.num_parameters == num_parameters(config)


def test_what_sees_in_gemma3_is_left_out(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "gemma3_text", head_dim=16)
    config = read_json(tmp_path / "config.json")
    file = tmp_path / "model.safetensors"
    weights = {f"language_model.{name}": value for name, value in load_file(file).items()}
    seeing = {"vision_tower.vision_model.post_layernorm.weight": torch.ones(4)}
    save_file({**weights, **seeing}, file)
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
    decoder = Decoder(ModelConfig.from_hf(whole), SafetensorsWeights(tmp_path), max_positions=64)
    assert decoder.num_parameters == sum(value.numel() for value in weights.values())

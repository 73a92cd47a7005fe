"""Model configurations: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model

from stallfree.errors import ModelError, UnsupportedModelError, WeightFileError
from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.weights import SafetensorsWeights

GOOD: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def test_the_longest_context_follows_the_scaling() -> None:
    def context(scaling: dict[str, Any]) -> int:
        return ModelConfig.from_hf({**GOOD, "rope_scaling": scaling}).max_context

    assert context({}) == 2048
    assert context({"type": "linear", "factor": 4.0}) == 8192
    assert context(YARN) == 2048
    assert context({**YARN, "original_max_position_embeddings": 2048}) == 8192


def test_windows() -> None:
    windowed = {**GOOD, "sliding_window": 16, "use_sliding_window": True}
    assert ModelConfig.from_hf(GOOD).sliding_windows == (None, None)
    assert ModelConfig.from_hf(windowed).sliding_windows == (None, None)  # from layer 28 on
    late = ModelConfig.from_hf({**windowed, "max_window_layers": 1})
    assert late.sliding_windows == (None, 16)
    kinds = ["sliding_attention", "full_attention"]
    assert ModelConfig.from_hf({**windowed, "layer_types": kinds}).sliding_windows == (16, None)


@pytest.mark.parametrize("architectures", [["GPT2LMHeadModel"], "GPT2LMHeadModel", 5, [None]])
def test_other_architectures_are_refused_by_name(architectures: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"not supported; these are: Llama") as caught:
        ModelConfig.from_hf({**GOOD, "architectures": architectures})
    if isinstance(architectures, str):
        assert "architecture GPT2LMHeadModel is" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": None},
        {"hidden_size": "64"},
        {"hidden_size": True},
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"rms_norm_eps": "x"},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": "x"},
        {"hidden_act": ["silu"]},
        {"rope_theta": 0},
        {"rope_theta": -1.0},
        {"rope_parameters": [1]},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"rope_scaling": {"rope_type": "linear", "factor": -2}},
        {"rope_scaling": {"rope_type": "linear", "factor": float("inf")}},
        {"rope_scaling": {"rope_type": "linear", "factor": 1e300}},
        {"rope_scaling": {**YARN, "beta_fast": -1}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "freq_factors"}},
        {"rope_scaling": {"rope_type": "freq_factors", "factors": [1.0]}},
        {"rope_scaling": {"rope_type": "longrope"}},
        {"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"sliding_window": "a", "use_sliding_window": True},
        {"sliding_window": 4, "use_sliding_window": True, "layer_types": 5},
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": "x"},
        {"hidden_act": "relu"},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_values_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        ModelConfig.from_hf({**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("no output layer", "no weight lm_head.weight"),
        ("an extra bias", "has no weight model.layers.0.self_attn.o_proj.bias"),
        ("an extra layer", "has no weight model.layers.7"),
        ("whole numbers", "torch.int32, which is not a float"),
        ("another shape", r"has shape \(3, 3\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: str, match: str) -> None:
    save_tiny_model(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    match change:
        case "no output layer":
            del tensors["lm_head.weight"]
        case "an extra bias":
            tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)
        case "an extra layer":
            tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
        case "whole numbers":
            tensors["model.norm.weight"] = tensors["model.norm.weight"].int()
        case _:
            tensors["lm_head.weight"] = torch.zeros(3, 3)
    save_file(tensors, file)
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    with pytest.raises(WeightFileError, match=match):
        Decoder(config, SafetensorsWeights(tmp_path), max_positions=64)


def test_frequencies_kept_by_old_files_are_ignored(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**load_file(file), **frequencies}, file)
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    Decoder(config, SafetensorsWeights(tmp_path), max_positions=64)

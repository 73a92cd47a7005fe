"""Weights of GGUF files: those that were written, in every type."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import byte_level_vocabulary, state_dict, write_gguf

from stallfree.errors import UnsupportedModelError, WeightFileError
from stallfree.model.gguf import GgufWeights, dequantize

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
KINDS = gguf.GGMLQuantizationType


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gives_the_weights_that_were_written(path: Path, architecture: str, tied: bool) -> None:
    written = state_dict(architecture, tied=tied)
    weights = GgufWeights(write_gguf(path, architecture, weights=written))
    assert weights.names() == written.keys()
    for name, values in written.items():
        tensor = weights.tensor(name)
        assert tensor.dtype == torch.float32
        assert np.array_equal(tensor.numpy(), values), name
    assert weights.hf_config["tie_word_embeddings"] == tied


def _read_by_transformers(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Configuration and weights, as `from_pretrained(gguf_file=...)` gets them."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.for_model(**load_gguf_checkpoint(path)["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parsed = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
    return config, parsed["tensors"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_the_same(path: Path, architecture: str) -> None:
    write_gguf(path, architecture, extra=byte_level_vocabulary())
    their_config, their_tensors = _read_by_transformers(path)
    weights = GgufWeights(path)
    assert weights.names() == their_tensors.keys()
    for name, tensor in their_tensors.items():
        assert torch.equal(weights.tensor(name), tensor), name
    config = weights.hf_config
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "model_type",
    ):
        assert config[field] == getattr(their_config, field), field
    ropes = their_config.rope_parameters
    assert config["rope_theta"] == ropes.get("full_attention", ropes)["rope_theta"]


def test_the_weights_of_experts_are_taken_apart(path: Path) -> None:
    written = state_dict("mixtral")
    counts = {"llama.expert_count": tiny_models.EXPERTS, "llama.expert_used_count": 2}
    weights = GgufWeights(write_gguf(path, weights=written, extra=counts))
    assert weights.hf_config["architectures"] == ["MixtralForCausalLM"]
    assert weights.hf_config["num_experts_per_tok"] == 2
    assert weights.names() == written.keys()
    for name, values in written.items():
        assert np.array_equal(weights.tensor(name).numpy(), values), name


def _stored(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("kind", [kind for kind in KINDS if _stored(kind)], ids=lambda k: k.name)
def test_dequantizes_every_type(kind: gguf.GGMLQuantizationType) -> None:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_blocks = 70_000 // block_size  # more than one piece
    data = np.random.default_rng(kind).integers(0, 256, num_blocks * block_bytes, np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(data.reshape(1, -1), kind).reshape(-1)
    values = dequantize(data, kind)
    assert values.dtype == np.float32
    assert values.size == num_blocks * block_size
    assert np.array_equal(values, expected, equal_nan=True)


@pytest.mark.parametrize("kind", [KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_0])
def test_reads_quantized_matrices(path: Path, kind: gguf.GGMLQuantizationType) -> None:
    written = state_dict("qwen2")
    weights = GgufWeights(write_gguf(path, "qwen2", weights=written, kind=kind))
    for name, values in written.items():
        stored = gguf.dequantize(gguf.quantize(values, kind), kind) if values.ndim == 2 else values
        assert np.array_equal(weights.tensor(name).numpy(), stored), name


def test_a_type_that_cannot_be_dequantized_is_refused_by_name(path: Path) -> None:
    data = write_gguf(path).read_bytes()
    entry = b"output_norm.weight" + struct.pack("<IQI", 1, tiny_models.HIDDEN, KINDS.F32)
    assert entry in data
    path.write_bytes(data.replace(entry, entry[:-4] + struct.pack("<I", KINDS.I32)))
    with pytest.raises(UnsupportedModelError, match="I32"):
        GgufWeights(path)


def test_a_name_that_is_not_there(path: Path) -> None:
    with pytest.raises(WeightFileError, match=r"no weight model\.nothing"):
        GgufWeights(write_gguf(path)).tensor("model.nothing")

"""GGUF files: weights, configuration, and every way a file can be wrong."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import byte_level_vocabulary, state_dict, write_gguf

from stallfree.errors import ModelError, UnsupportedModelError, WeightFileError
from stallfree.model.demo import assemble
from stallfree.model.gguf import GgufWeights, dequantize
from stallfree.model.gguf_header import read_header

ARCHITECTURES = ("llama", "qwen2", "qwen3")
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
    assert config["rope_theta"] == their_config.rope_parameters["rope_theta"]


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


def test_end_tokens(path: Path) -> None:
    weights = GgufWeights(write_gguf(path, extra=byte_level_vocabulary()))
    tokens = byte_level_vocabulary()["tokenizer.ggml.tokens"]
    assert {tokens[i] for i in weights.end_token_ids} == {"<|endoftext|>", "<|im_end|>"}


@pytest.mark.parametrize(
    ("architecture", "extra", "match"),
    [
        ("gemma3", {}, r"'gemma3'.*llama, qwen2, qwen3"),
        ("llama", {"llama.expert_count": 8}, "mixture of experts"),
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


def test_a_name_that_is_not_there(path: Path) -> None:
    with pytest.raises(WeightFileError, match=r"no weight model\.nothing"):
        GgufWeights(write_gguf(path)).tensor("model.nothing")


def _with_counts(tensors: int, keys: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:8] + struct.pack("<QQ", tensors, keys) + data[24:]


def _replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, new)

    return change


_EMBEDDING = b"token_embd.weight" + struct.pack("<I", 2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: b"", "not a GGUF file"),
        (lambda data: b"PK\x03\x04" + data[4:], "not a GGUF file"),
        (lambda data: data[:4], "beyond the 4 bytes"),
        (lambda data: data[:4] + b"\x01\0\0\0" + data[8:], "version 1"),
        (lambda data: data[:4] + b"\0\0\0\x03" + data[8:], "big-endian"),
        (lambda data: data[:-1000], "truncated"),
        (lambda data: data[:600], "beyond"),
        (lambda data: data + bytes(4096), "the file has"),
        (_with_counts(2**63, 1), "tensors; the limit"),
        (_with_counts(1, 2**64 - 1), "metadata keys; the limit"),
        (_with_counts(0, 0), "the file has"),
        (_with_counts(200_000, 12), "not a usable GGUF file"),
        (_replaced(_EMBEDDING, _EMBEDDING[:-4] + struct.pack("<I", 2**31)), "dimensions"),
        (_replaced(_EMBEDDING, _EMBEDDING[:-4] + struct.pack("<I", 0)), "unknown type 64"),
        (
            _replaced(_EMBEDDING + struct.pack("<Q", 64), _EMBEDDING + struct.pack("<Q", 2**63)),
            "truncated",
        ),
        (
            _replaced(_EMBEDDING + struct.pack("<Q", 64), _EMBEDDING + struct.pack("<Q", 0)),
            "shape",
        ),
        (_replaced(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"), "there twice"),
        (_replaced(b"llama.block_count", b"llama.block_c\xff\xfe\xfdt"), "UTF-8"),
        (_replaced(b"llama.embedding_length", b"llama.attention.key_le"), "incomplete|missing|is"),
        (
            _replaced(
                struct.pack("<Q", 17) + b"llama.block_count",
                struct.pack("<Q", 2**63) + b"llama.block_count",
            ),
            "bytes of a name",
        ),
        (
            _replaced(
                b"llama.block_count" + struct.pack("<I", 4),
                b"llama.block_count" + struct.pack("<I", 99),
            ),
            "unknown type 99",
        ),
        (
            _replaced(
                b"llama.block_count" + struct.pack("<II", 4, 2),
                b"llama.block_count" + struct.pack("<II", 9, 9),
            ),
            "array of arrays|beyond|elements",
        ),
    ],
)
def test_corrupt_and_hostile_files(
    path: Path, change: Callable[[bytes], bytes], match: str
) -> None:
    data = write_gguf(path).read_bytes()
    path.write_bytes(change(data))
    with pytest.raises(WeightFileError, match=match) as caught:
        GgufWeights(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("alignment", [0, 3, 4, 48, 2**31])
def test_absurd_alignment(path: Path, alignment: int) -> None:
    write_gguf(path, extra={"general.alignment": 32})
    old = b"general.alignment" + struct.pack("<II", 4, 32)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, old[:-4] + struct.pack("<I", alignment)))
    with pytest.raises(WeightFileError, match="alignment"):
        read_header(path)


def test_overlapping_tensors(path: Path) -> None:
    data = write_gguf(path).read_bytes()
    name = b"blk.0.attn_output.weight"
    at = data.index(name) + len(name) + 4 + 16 + 4  # dimensions, shape, type
    for offset in (0, 64, 7):
        path.write_bytes(data[:at] + struct.pack("<Q", offset) + data[at + 8 :])
        with pytest.raises(WeightFileError, match="misplaced"):
            read_header(path)


def test_strings_longer_than_the_file(path: Path) -> None:
    write_gguf(path, extra=byte_level_vocabulary())
    data = path.read_bytes()
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4
    for position, value in ((at + 4, 2**40), (at + 4, 2**64 - 1), (at + 12, 2**63)):
        path.write_bytes(data[:position] + struct.pack("<Q", value) + data[position + 8 :])
        with pytest.raises(WeightFileError):
            read_header(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.gguf"):
        with pytest.raises(WeightFileError, match="not a file"):
            GgufWeights(path)


def _mutated(data: bytes, header_bytes: int, rng: random.Random) -> bytes:
    """The file with a few bytes changed, mostly in the header, or cut, or with some bytes more."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        at = rng.randrange(header_bytes if rng.random() < 0.9 else len(data))
        match rng.randrange(5):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed[at : at + 8] = struct.pack("<Q", rng.choice((0, 2**31, 2**63, 2**64 - 1)))
            case 3:
                del changed[at : at + rng.randrange(1, 40)]
            case 4:
                changed[at:at] = rng.randbytes(rng.randrange(1, 40))
    if rng.random() < 0.2:
        del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


def test_damaged_files_load_or_are_refused(path: Path) -> None:
    write_gguf(path, "qwen2", extra=byte_level_vocabulary(), kind=KINDS.Q8_0)
    data = path.read_bytes()
    header_bytes = len(data) - sum(info.num_bytes for info in read_header(path).tensors.values())
    rng = random.Random(2024)
    loaded = 0
    tracemalloc.start()
    started = time.monotonic()
    for _ in range(300):
        path.write_bytes(_mutated(data, header_bytes, rng))
        try:
            weights = GgufWeights(path)
            for name in weights.names():
                weights.tensor(name)
            loaded += 1
        except ModelError:
            pass
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < loaded < 300
    assert peak_bytes < 20 * len(data)
    assert time.monotonic() - started < 60


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_model_equals_what_transformers_loads() -> None:
    path = assemble()
    _, their_tensors = _read_by_transformers(path)
    weights = GgufWeights(path)
    assert weights.names() == their_tensors.keys()
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.11.self_attn.v_proj.weight",
        "model.layers.23.mlp.down_proj.weight",
        "model.layers.23.input_layernorm.weight",
    ):
        assert torch.equal(weights.tensor(name), their_tensors[name]), name


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

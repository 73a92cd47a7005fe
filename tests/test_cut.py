"""Parts of tensors: the same as of the whole, and no more is read than they take."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import pytest
import torch
from int8_models import open_weights, save_model
from safetensors.torch import save_file
from tiny import save_tiny_model
from tiny_models import state_dict, write_gguf
from transformers import AutoConfig

from stallfree.errors import WeightFileError
from stallfree.model import file_bytes
from stallfree.model.config import ModelConfig
from stallfree.model.cut import Cut
from stallfree.model.decoder import Decoder
from stallfree.model.gguf import GgufWeights
from stallfree.model.int8 import is_supported
from stallfree.model.int8_decoder import Int8Decoder
from stallfree.model.part import parts_of
from stallfree.model.weights import HeldWeights, SafetensorsWeights

CUTS = [
    Cut(),
    Cut(slice(0, 2)),
    Cut(slice(3, 7)),
    Cut(slice(6, 14)),
    Cut(slice(20, 30)),
    Cut(columns=slice(32, 64)),
    Cut(slice(1, 5), slice(0, 32)),
]


class Read:
    """Counts bytes that are read of files of weights."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def pread(self, file: int, count: int, start: int) -> bytes:
        found = os.pread(file, count, start)
        self.num_bytes += len(found)
        return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    counter = Read()

    class Os:
        pread = staticmethod(counter.pread)

        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

    monkeypatch.setattr(file_bytes, "os", Os())
    return counter


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cut", CUTS)
def test_of_a_safetensors_file_no_more_is_read_than_a_part(
    tmp_path: Path, read: Read, dtype: torch.dtype, cut: Cut
) -> None:
    tensors = {
        "before": torch.arange(7).to(dtype),
        "matrix": torch.arange(640).remainder(101).to(dtype).reshape(10, 64),
        "bias": torch.arange(10).to(dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    weights, held = SafetensorsWeights(tmp_path), HeldWeights(tensors)
    for name in ("matrix", "bias"):
        expected = cut.of(tensors[name])
        assert weights.shape(name) == held.shape(name) == tuple(tensors[name].shape)
        read.num_bytes = 0
        part = weights.tensor(name, cut)
        assert part.dtype == dtype
        assert torch.equal(part, expected)
        assert read.num_bytes == part.nbytes
        assert part.untyped_storage().nbytes() == part.nbytes
        assert torch.equal(held.tensor(name, cut), expected)
        assert held.tensor(name, cut).untyped_storage().nbytes() == expected.nbytes


def test_a_file_that_is_cut_short_meanwhile(tmp_path: Path) -> None:
    save_file({"a": torch.ones(10, 64)}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(WeightFileError, match="cut short"):
        weights.tensor("a", Cut(columns=slice(3, 5)))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_of_a_gguf_file(tmp_path: Path, read: Read, architecture: str) -> None:
    """Rows of q and k of the first are in another order in the file."""
    written = state_dict(architecture)
    weights = GgufWeights(write_gguf(tmp_path / "tiny.gguf", architecture, weights=written))
    for name in written:
        whole = weights.tensor(name)
        assert weights.shape(name) == tuple(whole.shape)
        for cut in CUTS:
            read.num_bytes = 0
            assert torch.equal(weights.tensor(name, cut), cut.of(whole)), name
            is_permuted = architecture == "llama" and (".q_proj." in name or ".k_proj." in name)
            if whole.dim() == 2 and not is_permuted:
                assert read.num_bytes == len(whole[cut.rows]) * whole.shape[1] * 4


def test_rows_of_whole_blocks(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "tiny.gguf"
    weights = GgufWeights(write_gguf(path, kind=gguf.GGMLQuantizationType.Q8_0))
    whole = weights.tensor("model.layers.0.mlp.down_proj.weight")
    read.num_bytes = 0
    part = weights.tensor("model.layers.0.mlp.down_proj.weight", Cut(slice(2, 6), slice(5, 9)))
    assert torch.equal(part, whole[2:6, 5:9])
    assert read.num_bytes == 4 * whole.shape[1] * 34 // 32


def float_bytes(folder: Path, read: Read, shares: int) -> list[int]:
    """What each of so many processes reads of a model in floats."""
    save_tiny_model(folder, vocab_size=320)
    config = ModelConfig.from_hf(AutoConfig.from_pretrained(folder).to_dict())
    counts = []
    for part in parts_of(config, [config.num_layers], shares)[0]:
        weights = SafetensorsWeights(folder)
        read.num_bytes = 0
        Decoder(config, weights, max_positions=64, part=part)
        counts.append(read.num_bytes)
    return counts


def int8_bytes(folder: Path, read: Read, shares: int) -> list[int]:
    """What each of so many processes reads of a model in int8."""
    config, _ = open_weights(save_model(folder, "gemma"))
    counts = []
    for part in parts_of(config, [config.num_layers], shares)[0]:
        _, weights = open_weights(folder)
        read.num_bytes = 0
        Int8Decoder(config, weights, max_positions=64, threads=1, part=part)
        counts.append(read.num_bytes)
    return counts


@pytest.mark.parametrize(
    "bytes_of",
    [
        float_bytes,
        pytest.param(
            int8_bytes,
            marks=pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU"),
        ),
    ],
)
def test_a_process_reads_its_share_of_a_model(tmp_path: Path, read: Read, bytes_of: object) -> None:
    assert callable(bytes_of)
    [whole] = bytes_of(tmp_path, read, 1)
    for part in bytes_of(tmp_path, read, 2):
        assert 0.5 * whole < part < 0.53 * whole  # norms are read by all

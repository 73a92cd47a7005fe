"""Safetensors files, whole and sharded, and every way they can be wrong."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stallfree.errors import ModelError, WeightFileError
from stallfree.model.weights import SafetensorsWeights, read_json

TENSORS = {
    "model.embed_tokens.weight": torch.arange(12.0).reshape(4, 3),
    "model.norm.weight": torch.ones(3, dtype=torch.bfloat16),
    "lm_head.weight": torch.ones(4, 3, dtype=torch.float16),
}


def _save(folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file(TENSORS, path)
    return path


def _save_sharded(folder: Path) -> dict[str, str]:
    names = sorted(TENSORS)
    weight_map = {name: f"model-0000{i + 1}-of-00003.safetensors" for i, name in enumerate(names)}
    for name, file in weight_map.items():
        save_file({name: TENSORS[name]}, folder / file)
    _save_index(folder, weight_map)
    return weight_map


def _save_index(folder: Path, weight_map: Any) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("save", [_save, _save_sharded])
def test_gives_the_tensors_as_they_are_stored(tmp_path: Path, save: Any) -> None:
    save(tmp_path)
    weights = SafetensorsWeights(tmp_path)
    assert weights.names() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = weights.tensor(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    _save(tmp_path)
    with pytest.raises(WeightFileError, match=r"no weight model\.nothing"):
        SafetensorsWeights(tmp_path).tensor("model.nothing")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    weight_map = _save_sharded(tmp_path)
    shard = weight_map["model.norm.weight"]
    (tmp_path / shard).unlink()
    with pytest.raises(WeightFileError, match=rf"{shard} is missing"):
        SafetensorsWeights(tmp_path)


def test_an_index_that_names_what_a_shard_does_not_hold(tmp_path: Path) -> None:
    weight_map = _save_sharded(tmp_path)
    _save_index(tmp_path, weight_map | {"model.more": weight_map["lm_head.weight"]})
    with pytest.raises(WeightFileError, match=r"model\.more is in .* it is not"):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "model.bin", 7, None],
)
def test_an_index_that_points_elsewhere(tmp_path: Path, file: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    _save(tmp_path)
    _save_index(folder, {"model.norm.weight": file})
    with pytest.raises(WeightFileError, match="only read from safetensors files directly in"):
        SafetensorsWeights(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_an_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    _save_index(tmp_path, weight_map)
    with pytest.raises(WeightFileError, match="no weight_map"):
        SafetensorsWeights(tmp_path)


def _header(content: Any) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 4,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 90_000_000) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{\xff",
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]}}) + bytes(8),
        _header({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]}}) + bytes(8),
        _header({"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8),
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}) + bytes(8),
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + bytes(9),
    ],
)
def test_hostile_headers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightFileError, match="not a usable safetensors file"):
        SafetensorsWeights(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(WeightFileError):
            SafetensorsWeights(tmp_path)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(WeightFileError, match=r"pytorch_model\.bin is a pickle.*never loaded"):
        SafetensorsWeights(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match=r"neither model\.safetensors nor"):
        SafetensorsWeights(tmp_path)
    (tmp_path / "some.gguf").touch()
    with pytest.raises(WeightFileError, match="name the file itself"):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "a JSON list, not an object"),
    ],
)
def test_broken_json(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=match):
        read_json(tmp_path / "config.json")


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ModelError, match="cannot be read"):
        read_json(tmp_path)


def test_a_file_that_is_cut_short_or_replaced_after_it_was_opened(tmp_path: Path) -> None:
    path = _save(tmp_path)
    weights = SafetensorsWeights(tmp_path)
    path.rename(tmp_path / "old")
    path.write_bytes(b"another")
    assert all(torch.equal(weights.tensor(name), TENSORS[name]) for name in TENSORS)
    os.truncate(tmp_path / "old", 100)
    with pytest.raises(WeightFileError, match=rf"{path} has 100 bytes and had .* cut short"):
        [weights.tensor(name) for name in TENSORS]


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float64]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (700, 800)])
def test_types_and_shapes(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).remainder(97).to(dtype).reshape(shape)
    save_file({"a": torch.ones(3), "b": tensor}, tmp_path / "model.safetensors")
    read = SafetensorsWeights(tmp_path).tensor("b")
    assert read.dtype == dtype
    assert torch.equal(read, tensor)

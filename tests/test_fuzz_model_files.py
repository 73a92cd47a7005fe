"""Model files are data: whatever is in one, it loads or is refused, soon and in little room.

See `fuzzing` for how many files are tried.
"""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from fuzzing import EDITS, JSON, Edit, damaged, fuzzed, json_paths, with_part
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from tiny import save_tiny_model, train_tokenizer
from tiny_models import byte_level_vocabulary, write_gguf

from stallfree.engine.tokenizer_files import read_tokenizer
from stallfree.errors import ModelError
from stallfree.model.config import ModelConfig
from stallfree.model.gguf_parser import read_header
from stallfree.model.source import open_model
from stallfree.model.weights import SafetensorsWeights

MOST_BYTES = 32 << 20  # for reading files of less than 1 MB
LONGEST_S = 20.0
TENSORS = {
    "model.embed_tokens.weight": torch.arange(12.0).reshape(4, 3),
    "model.norm.weight": torch.ones(3, dtype=torch.bfloat16),
    "lm_head.weight": torch.ones(4, 3, dtype=torch.float16),
}


@contextmanager
def refused_or_read() -> Iterator[None]:
    """What is within may raise ModelError, and nothing else; its time and memory are bounded."""
    tracemalloc.start()
    started_s = time.monotonic()
    message = ""
    try:
        yield
    except ModelError as error:
        message = str(error)
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(message) < 2000
    assert peak_bytes < MOST_BYTES
    assert time.monotonic() - started_s < LONGEST_S


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def gguf_file(folder: Path) -> tuple[bytes, int]:
    """A GGUF file, and how long its header is."""
    path = write_gguf(
        folder / "whole.gguf",
        "qwen2",
        extra=byte_level_vocabulary(),
        kind=gguf.GGMLQuantizationType.Q8_0,
    )
    read_tokenizer(path)  # imports what is large
    data = path.read_bytes()
    num_bytes = sum(info.num_bytes for info in read_header(path).tensors.values())
    return data, len(data) - num_bytes


@fuzzed()
@given(EDITS)
def test_gguf(folder: Path, gguf_file: tuple[bytes, int], edits: list[Edit]) -> None:
    data, header_bytes = gguf_file
    path = folder / "damaged.gguf"
    path.write_bytes(damaged(data, edits, header_bytes))
    with refused_or_read():
        source = open_model(str(path))
        for name in source.weights.names():
            source.weights.tensor(name)


@fuzzed(0.1)
@given(EDITS)
def test_the_tokenizer_of_a_gguf(
    folder: Path, gguf_file: tuple[bytes, int], edits: list[Edit]
) -> None:
    data, header_bytes = gguf_file
    path = folder / "damaged.gguf"
    path.write_bytes(damaged(data, edits, header_bytes))
    with refused_or_read():
        read_tokenizer(path)


def read_all(folder: Path) -> None:
    weights = SafetensorsWeights(folder)
    for name in weights.names():
        weights.tensor(name)


@fuzzed()
@given(EDITS, st.booleans())
def test_safetensors(folder: Path, edits: list[Edit], anywhere: bool) -> None:
    data = save(TENSORS)
    header_bytes = 8 + struct.unpack_from("<Q", data)[0]
    path = folder / "model.safetensors"
    path.write_bytes(damaged(data, edits, None if anywhere else header_bytes))
    with refused_or_read():
        read_all(folder)


@fuzzed()
@given(st.data())
def test_headers_of_safetensors(folder: Path, data: st.DataObject) -> None:
    """A header that is JSON, with anything in it."""
    whole = save(TENSORS)
    header_bytes = struct.unpack_from("<Q", whole)[0]
    header = json.loads(whole[8 : 8 + header_bytes])
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(json_paths(header)))
        header = with_part(header, path, data.draw(JSON))
    text = json.dumps(header).encode()
    file = struct.pack("<Q", len(text)) + text + whole[8 + header_bytes :]
    (folder / "model.safetensors").write_bytes(file)
    with refused_or_read():
        read_all(folder)


@fuzzed()
@given(st.data())
def test_the_index_of_shards(folder: Path, data: st.DataObject) -> None:
    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    (shards / "a.safetensors").write_bytes(save(TENSORS))
    index: Any = {"metadata": {}, "weight_map": dict.fromkeys(TENSORS, "a.safetensors")}
    path = data.draw(st.sampled_from(json_paths(index)))
    index = with_part(index, path, data.draw(JSON))
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused_or_read():
        read_all(shards)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    names = ("qwen2", "llama", "gemma3_text", "falcon", "mixtral")
    return {name: save_tiny_model(folder / name, name) for name in names}


CONFIG_VALUES = st.one_of(
    JSON,
    st.sampled_from(["yarn", "llama3", "linear", "dynamic", "gelu", "sliding_attention", 2, 4, 64]),
)


@fuzzed(2)
@given(st.data())
def test_configurations(models: dict[str, Path], data: st.DataObject) -> None:
    model = models[data.draw(st.sampled_from(sorted(models)))]
    config = json.loads((model / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(json_paths(config)))
        config = with_part(config, path, data.draw(CONFIG_VALUES))
    kept = (model / "config.json").read_text()
    (model / "config.json").write_text(json.dumps(config))
    try:
        with refused_or_read():
            ModelConfig.from_hf(open_model(str(model)).hf_config)
    finally:
        (model / "config.json").write_text(kept)


@fuzzed()
@given(st.data())
def test_small_files(models: dict[str, Path], data: st.DataObject) -> None:
    """The files that are read beside the configuration, and the configuration as bytes."""
    model = models["qwen2"]
    names = ["config.json", "generation_config.json", "tokenizer_config.json"]
    path = model / data.draw(st.sampled_from(names))
    kept = path.read_bytes()
    path.write_bytes(damaged(kept, data.draw(EDITS)))
    try:
        with refused_or_read():
            ModelConfig.from_hf(open_model(str(model)).hf_config)
    finally:
        path.write_bytes(kept)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(300).save_pretrained(folder)
    read_tokenizer(folder)  # imports what is large
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@fuzzed(0.4)
@given(st.data())
def test_tokenizers(folder: Path, tokenizer: dict[str, bytes], data: st.DataObject) -> None:
    model = folder / "tokenizer"
    model.mkdir(exist_ok=True)
    for name, content in tokenizer.items():
        (model / name).write_bytes(content)
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    if data.draw(st.booleans()):
        (model / name).write_bytes(damaged(tokenizer[name], data.draw(EDITS)))
    else:
        value = json.loads(tokenizer[name])
        path = data.draw(st.sampled_from([path for path in json_paths(value) if len(path) < 4]))
        (model / name).write_text(json.dumps(with_part(value, path, data.draw(JSON))))
    with refused_or_read():
        read_tokenizer(model)

"""The cache of int8 weights is found by content, never by place or time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from int8_cache_models import NAME, Unread, entries, is_cached, save_model, start, use_cache

from stallfree.errors import WeightFileError
from stallfree.model import int8_cache
from stallfree.model.int8_cache import int8_weights
from stallfree.model.weight_reader import SCALES
from stallfree.model.weights import SafetensorsWeights


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_cache(tmp_path / "cache", monkeypatch)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were hashed, in order."""
    names: list[str] = []
    file_digest = hashlib.file_digest

    def counting(stream: Any, digest: str) -> Any:
        names.append(Path(stream.name).name)
        return file_digest(stream, digest)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return names


def test_a_copied_a_moved_and_a_touched_model_are_the_same(cache: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    values = start(model)
    copied = Path(shutil.copytree(model, tmp_path / "copied"))
    moved = model.rename(tmp_path / "moved")
    os.utime(copied / "model.safetensors")
    for folder in (copied, moved):
        assert torch.equal(int8_weights(folder, Unread()).tensor(NAME), values)
    assert len(entries(cache)) == 1


def test_a_model_of_one_file_may_be_called_anything(cache: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    file = model / "model.safetensors"
    int8_weights(file, SafetensorsWeights(model))
    assert is_cached(file.rename(tmp_path / "other"))


def test_links_lead_to_the_same_content(cache: Path, tmp_path: Path, hashed: list[str]) -> None:
    model = save_model(tmp_path / "model")
    start(model)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(model / "model.safetensors")
    (snapshot / "missing.safetensors").symlink_to(tmp_path / "nowhere")
    hashed.clear()
    assert is_cached(snapshot)
    assert hashed == []


@pytest.mark.parametrize("settled_ns", [0, int8_cache._SETTLED_NS])
def test_a_model_rewritten_at_the_same_size_and_time_is_another(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled_ns: int
) -> None:
    monkeypatch.setattr(int8_cache, "_SETTLED_NS", settled_ns)
    file = save_model(tmp_path / "model") / "model.safetensors"
    other = (save_model(tmp_path / "other", seed=1) / "model.safetensors").read_bytes()
    before = file.stat()
    values = start(file.parent)
    with file.open("r+b") as stream:
        stream.write(other)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert not torch.equal(start(file.parent), values)
    assert len(entries(cache)) == 2


def test_another_index_of_the_shards_makes_another_model(cache: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    start(model)
    index = {"weight_map": {NAME: "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = int8_weights(model, SafetensorsWeights(model))
    assert weights.names() == {NAME, NAME + SCALES}


def test_only_files_that_changed_are_hashed_again(
    cache: Path, tmp_path: Path, hashed: list[str]
) -> None:
    model = save_model(tmp_path / "model")
    shutil.copy(model / "model.safetensors", model / "more.safetensors")
    start(model)
    assert hashed == ["model.safetensors", "more.safetensors"]
    os.utime(model / "more.safetensors")
    start(model)
    start(model)
    assert hashed == ["model.safetensors", "more.safetensors", "more.safetensors"]


def test_a_file_written_just_now_is_not_remembered(
    cache: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_cache, "_SETTLED_NS", 10**12)
    model = save_model(tmp_path / "model")
    start(model)
    hashed.clear()
    assert is_cached(model)
    assert hashed == ["model.safetensors"]


BROKEN_INDEXES = [
    b"",
    b"\xff\xfe",
    b"[" * 100_000,
    b"[1]",
    b'{"FILE": null}',
    b'{"FILE": [MARKS]}',
    b'{"FILE": [MARKS, ""]}',
    b'{"FILE": [MARKS, "%s"]}' % (b"F" * 64),
    b'{"FILE": [MARKS, ["%s"]]}' % (b"0" * 64),
    b'{"FILE": [1e999, NaN, %s, 0, ""]}' % (b"9" * 10_000),
    b'{"FILE": [MARKS, "%s"]}' % (b"0" * 64) + b" " * int8_cache._MAX_INDEX_BYTES,
]


@pytest.mark.parametrize("broken", BROKEN_INDEXES, ids=range(len(BROKEN_INDEXES)))
def test_a_broken_index_is_written_anew(
    cache: Path, tmp_path: Path, hashed: list[str], broken: bytes
) -> None:
    model = save_model(tmp_path / "model")
    start(model)
    index = cache / "hashes.json"
    whole = index.read_bytes()
    [(name, record)] = json.loads(whole).items()
    marks = json.dumps(record[:-1])[1:-1]
    index.write_bytes(broken.replace(b"FILE", name.encode()).replace(b"MARKS", marks.encode()))
    hashed.clear()
    assert is_cached(model)
    assert hashed == ["model.safetensors"]
    assert index.read_bytes() == whole


def test_an_index_that_cannot_be_written_is_done_without(cache: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (cache / "hashes.json").mkdir(parents=True)
    start(model)
    assert is_cached(model)


def test_the_index_keeps_the_newest_files(
    cache: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_cache, "_MAX_INDEX_FILES", 2)
    models = [save_model(tmp_path / str(seed), seed) for seed in range(3)]
    for model in models:
        start(model)
    os.utime(models[1] / "model.safetensors")
    start(models[1])
    start(models[0])
    index = json.loads((cache / "hashes.json").read_bytes())
    assert list(index) == [str(models[i] / "model.safetensors") for i in (1, 0)]


def test_a_file_that_cannot_be_read_is_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match=r"gone\.gguf cannot be read: No such file"):
        int8_weights(tmp_path / "gone.gguf", Unread())

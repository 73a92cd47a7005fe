"""The cache of int8 weights: found by content, never by place or time; small; never damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from tiny_models import write_gguf

from stallfree.errors import WeightFileError
from stallfree.model import int8_cache
from stallfree.model.gguf import GgufWeights
from stallfree.model.int8 import quantize_rows, weight_levels
from stallfree.model.int8_cache import HeldWeights, int8_weights
from stallfree.model.weight_reader import SCALES
from stallfree.model.weights import SafetensorsWeights

NAME = "a.weight"


class Unread(HeldWeights):
    """Weights that must not be quantized."""

    def __init__(self) -> None:
        super().__init__({})

    def names(self) -> frozenset[str]:
        raise LookupError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the entries; hashes are remembered although the files are new."""
    monkeypatch.setenv("STALLFREE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(int8_cache, "_SETTLED_NS", 0)
    return tmp_path / "cache" / "int8"


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


def save_model(folder: Path, seed: int = 0) -> Path:
    """Files of the same size for every seed."""
    folder.mkdir(exist_ok=True)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
    tensors = {NAME: weight, "a.bias": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def start(folder: Path) -> torch.Tensor:
    """The int8 values of the model in `folder`, as a process that starts gets them."""
    return int8_weights(folder, SafetensorsWeights(folder)).tensor(NAME)


def is_cached(folder: Path) -> bool:
    try:
        return NAME in int8_weights(folder, Unread()).names()
    except LookupError:
        return False


def entries(cache: Path) -> list[str]:
    return sorted(file.parent.name for file in cache.glob("*/model.safetensors"))


def lock_of(cache: Path, model: Path) -> Path:
    """The lock of the model's entry, in a folder that exists."""
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"{int8_cache._key(model)}.lock"


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


def test_the_entries_unused_for_longest_are_dropped(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_cache, "_MAX_ENTRIES", 2)
    models = [save_model(tmp_path / str(seed), seed) for seed in range(3)]
    start(models[0])
    start(models[1])
    for age, name in enumerate(entries(cache), start=1):
        os.utime(cache / name / "model.safetensors", (age, age))
    start(models[0])
    start(models[2])
    assert len(entries(cache)) == 2
    assert [is_cached(model) for model in models] == [True, False, True]


def test_an_entry_just_written_stays_though_others_seem_newer(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_cache, "_MAX_ENTRIES", 1)
    old, new = (save_model(tmp_path / str(seed), seed) for seed in range(2))
    start(old)
    [entry] = entries(cache)
    os.utime(cache / entry / "model.safetensors", (2**32, 2**32))
    start(new)
    assert len(entries(cache)) == 1
    assert entries(cache) != [entry]


def test_what_a_killed_process_left_is_removed(cache: Path, tmp_path: Path) -> None:
    old, new = (save_model(tmp_path / str(seed), seed) for seed in range(2))
    start(old)
    [entry] = entries(cache)
    leftovers = [cache / entry / ".model.safetensors.x", cache / "dead" / ".tmpx"]
    for leftover in leftovers:
        leftover.parent.mkdir(exist_ok=True)
        leftover.write_bytes(b"half")
    start(new)
    assert not any(leftover.exists() for leftover in leftovers)
    assert is_cached(old)


def test_processes_that_start_together_quantize_once(cache: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    quantized = []
    is_waiting = threading.Barrier(3)

    def run() -> None:
        is_waiting.wait(5)
        int8_weights(model, SafetensorsWeights(model), lambda done, _: quantized.append(done))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert quantized == [1, 2]
    assert is_cached(model)


def test_a_lock_that_is_never_released_is_not_waited_for_for_ever(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(int8_cache, "_LOCK_TIMEOUT_S", 0.01)
    model = save_model(tmp_path / "model")
    with FileLock(lock_of(cache, model)):
        assert start(model).dtype == torch.int8
    assert "waiting for another process that rounds this model" in caplog.text
    assert "another process has held" in caplog.text
    assert entries(cache) == []


def test_another_model_is_not_waited_for_nor_is_its_half_written_file_removed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(int8_cache, "_MAX_ENTRIES", 1)
    old, new = (save_model(tmp_path / str(seed), seed) for seed in range(2))
    lock = lock_of(cache, old)
    half = lock.with_suffix("") / ".model.safetensors.x"
    half.parent.mkdir()
    half.write_bytes(b"half")
    with FileLock(lock):
        start(new)
    assert half.exists()
    assert is_cached(new)
    assert caplog.text == ""


def test_the_lock_outlives_an_entry_that_is_dropped(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_cache, "_MAX_ENTRIES", 1)
    old, new = (save_model(tmp_path / str(seed), seed) for seed in range(2))
    lock = lock_of(cache, old)
    start(old)
    inode = lock.stat().st_ino
    start(new)
    assert not is_cached(old)
    assert lock.stat().st_ino == inode


def test_a_model_that_changes_while_it_is_read_is_refused(cache: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")

    def change(done: int, total: int) -> None:
        save_model(model, seed=done)

    with pytest.raises(WeightFileError, match="model changed while it was read; start again"):
        int8_weights(model, SafetensorsWeights(model), change)
    assert entries(cache) == []


def test_a_change_that_leaves_the_marks_is_refused(cache: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    weights = HeldWeights({NAME: torch.ones(4, 32)})  # without marks

    def change(done: int, total: int) -> None:
        save_model(model, seed=1)

    with pytest.raises(WeightFileError, match="changed while it was read"):
        int8_weights(model, weights, change)
    assert entries(cache) == []


def test_a_change_is_refused_without_a_cache_as_well(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("STALLFREE_CACHE", str(blocked))
    model = save_model(tmp_path / "model")
    with pytest.raises(WeightFileError, match="changed while it was read"):
        int8_weights(
            model, SafetensorsWeights(model), lambda done, _: os.utime(model / "model.safetensors")
        )


@pytest.mark.parametrize("is_new_cached", [False, True])
def test_a_model_replaced_after_it_was_opened_is_refused(
    cache: Path, tmp_path: Path, is_new_cached: bool
) -> None:
    model, new = save_model(tmp_path / "model"), save_model(tmp_path / "new", seed=1)
    right = quantize_rows(SafetensorsWeights(new).tensor(NAME), weight_levels())[0]
    if is_new_cached:
        start(new)
    opened = SafetensorsWeights(model)
    (new / "model.safetensors").rename(model / "model.safetensors")
    with pytest.raises(WeightFileError, match="model changed while it was read; start again"):
        int8_weights(model, opened)
    assert len(entries(cache)) == is_new_cached
    assert torch.equal(start(model), right)


def test_a_gguf_file_replaced_after_it_was_opened_is_noticed(cache: Path, tmp_path: Path) -> None:
    path, new = tmp_path / "model.gguf", tmp_path / "new.gguf"
    for file in (path, new):
        write_gguf(file)
    opened = GgufWeights(path)
    new.rename(path)
    with pytest.raises(WeightFileError, match=r"model\.gguf changed while it was read"):
        int8_weights(path, opened)
    assert entries(cache) == []


def test_why_an_entry_is_made_anew_is_said_once(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_model(tmp_path / "model")
    values = start(model).clone()  # it is mapped
    assert caplog.text == ""
    [file] = cache.glob("*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    assert torch.equal(start(model), values)
    [record] = caplog.records
    assert "are made anew: " in record.getMessage()
    assert "is not a usable safetensors file" in record.getMessage()


def test_an_entry_that_may_not_be_read_is_not_called_damaged(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_model(tmp_path / "model")
    start(model)

    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    weights = SafetensorsWeights(model)
    monkeypatch.setattr(int8_cache, "SafetensorsWeights", refuse)
    int8_weights(model, weights)
    assert "Permission denied" in caplog.text
    assert "damaged" not in caplog.text


def test_a_write_that_fails_leaves_nothing(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = HeldWeights({NAME: torch.randn(64, 4096, generator=generator)})
    model = save_model(tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        held = int8_weights(model, weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert held.tensor(NAME).shape == (64, 4096)
    assert "are not kept" in caplog.text
    assert [path.name for path in cache.glob("*/*")] == []


def test_a_file_that_cannot_be_read_is_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match=r"gone\.gguf cannot be read: No such file"):
        int8_weights(tmp_path / "gone.gguf", Unread())

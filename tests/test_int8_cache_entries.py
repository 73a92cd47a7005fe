"""Entries of the cache of int8 weights: few, whole, and written by one process at a time."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from int8_cache_models import NAME, entries, is_cached, lock_of, save_model, start, use_cache

from stallfree.model import int8_cache
from stallfree.model.int8_cache import HeldWeights, int8_weights
from stallfree.model.weights import SafetensorsWeights


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_cache(tmp_path / "cache", monkeypatch)


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

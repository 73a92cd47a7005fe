"""The cache of converted tokenizers: used while the model stays the same, never damaged."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_models import byte_level_vocabulary
from tiny_tokenizers import MESSAGES, TEXTS, load, save_gguf, save_tokenizer

from stallfree.engine import tokenizer_files


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, which is not there yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("STALLFREE_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "model")


def _entries(cache: Path) -> list[Path]:
    return list((cache / "tokenizers").iterdir())


def _never(*_: object) -> Any:
    raise AssertionError("must not be called")


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_the_second_start_converts_nothing(
    folder: Path, tmp_path: Path, cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder if kind == "folder" else save_gguf(tmp_path, byte_level_vocabulary())
    first = load(path)
    assert len(_entries(cache)) == 1
    monkeypatch.setattr(tokenizer_files, "_convert_folder", _never)
    monkeypatch.setattr(tokenizer_files, "convert_gguf", _never)
    second = load(path)
    for text in TEXTS:
        assert second.encode(text) == first.encode(text)
    assert second.render_chat(MESSAGES) == first.render_chat(MESSAGES)
    assert second.special_ids == first.special_ids
    assert second.eos_token_id == first.eos_token_id


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_change_of_the_model_is_noticed(
    folder: Path, cache: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder)
    os.utime(folder / name, (1, 1))
    monkeypatch.setattr(tokenizer_files, "_convert_folder", _never)
    with pytest.raises(AssertionError):
        load(folder)


def test_damaged_entries_are_made_anew(folder: Path, cache: Path) -> None:
    expected = load(folder).encode("hello world")
    (entry,) = _entries(cache)
    data = entry.read_bytes()
    middle = len(data) // 2
    for damaged in (
        b"",
        b"\n\n",
        data[:5],
        data[:middle],
        data[:middle] + b"\0" + data[middle + 1 :],
        b"00000000" + data[8:],
        data.replace(b"fingerprint", b"fingerprinT"),
    ):
        entry.write_bytes(damaged)
        assert load(folder).encode("hello world") == expected
        assert entry.read_bytes() == data


def test_a_cache_that_cannot_be_written(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the folder should be")
    assert load(folder).encode("hello")
    assert "not kept" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_old_entries_are_dropped(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_files, "_MAX_ENTRIES", 1)
    load(folder)
    (old,) = _entries(cache)
    os.utime(old, (1, 1))
    load(save_gguf(tmp_path, byte_level_vocabulary()))
    assert len(_entries(cache)) == 1
    assert not old.exists()

"""Models that change while their weights are rounded: never cached under a wrong name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from int8_cache_models import NAME, entries, save_model, start, use_cache
from tiny_models import write_gguf

from stallfree.errors import WeightFileError
from stallfree.model.gguf import GgufWeights
from stallfree.model.int8 import quantize_rows, weight_levels
from stallfree.model.int8_cache import HeldWeights, int8_weights
from stallfree.model.weights import SafetensorsWeights


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_cache(tmp_path / "cache", monkeypatch)


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

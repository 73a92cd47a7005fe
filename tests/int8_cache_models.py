"""Tiny models whose int8 weights are cached, and ways to look into the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stallfree.model import int8_cache
from stallfree.model.int8_cache import HeldWeights, int8_weights
from stallfree.model.weights import SafetensorsWeights

NAME = "a.weight"


class Unread(HeldWeights):
    """Weights that must not be quantized."""

    def __init__(self) -> None:
        super().__init__({})

    def names(self) -> frozenset[str]:
        raise LookupError


def use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache in `folder`; hashes are remembered although the files are new.

    Returns the folder of the entries.
    """
    monkeypatch.setenv("STALLFREE_CACHE", str(folder))
    monkeypatch.setattr(int8_cache, "_SETTLED_NS", 0)
    return folder / "int8"


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

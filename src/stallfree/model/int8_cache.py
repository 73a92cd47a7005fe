"""int8 weights on disk: a model is quantized once, and mapped from then on.

While it is quantized its float weights are in memory one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from stallfree.cache import atomic_file, cache_folder
from stallfree.errors import ModelError, WeightFileError
from stallfree.model.int8 import quantize_rows
from stallfree.model.weight_reader import SCALES
from stallfree.model.weights import SafetensorsWeights, WeightSource

_FORMAT = 1
_MAX_ENTRIES = 4
_FILE = "model.safetensors"
_log = logging.getLogger(__name__)


class HeldWeights:
    """Tensors in memory, for where the cache folder cannot be written."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> frozenset[str]:
        """All names."""
        return frozenset(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor.

        Raises:
            WeightFileError: there is none of that name.
        """
        if name not in self._tensors:
            raise WeightFileError(f"there is no weight {name}")
        return self._tensors[name]


def int8_weights(
    path: Path, weights: WeightSource, on_tensor: Callable[[int, int], None] | None = None
) -> WeightSource:
    """The weights of the model at `path` with every matrix in int8.

    A matrix `x.weight` comes as int8 and has its scales, float32 (out,), as `x.weight.scales`;
    everything else is as in `weights`.

    Args:
        path: the model's folder or file; the cache notices when it changes.
        weights: its own.
        on_tensor: called with how many tensors of how many are quantized, for progress.

    Raises:
        WeightFileError: a weight cannot be read.
    """
    folder = cache_folder() / "int8" / _key(path)
    if (folder / _FILE).is_file():
        try:
            return SafetensorsWeights(folder)
        except WeightFileError as error:
            _log.warning("making damaged int8 weights anew: %s", error)
    tensors = _quantize(weights, on_tensor)
    try:
        with atomic_file(folder / _FILE, sum(tensor.nbytes for tensor in tensors.values())) as file:
            save_file(tensors, file.name)
        _drop_old_entries(folder.parent)
    except (ModelError, OSError) as error:
        _log.warning("the int8 weights are not kept, so each start takes longer: %s", error)
        return HeldWeights(tensors)
    del tensors
    return SafetensorsWeights(folder)


def _quantize(
    weights: WeightSource, on_tensor: Callable[[int, int], None] | None
) -> dict[str, torch.Tensor]:
    tensors = {}
    names = sorted(weights.names())
    for index, name in enumerate(names):
        tensor = weights.tensor(name)
        if tensor.dim() == 2:
            tensors[name], tensors[name + SCALES] = quantize_rows(tensor.float())
        else:
            tensors[name] = tensor.float()
        if on_tensor is not None:
            on_tensor(index + 1, len(names))
    return tensors


def _key(path: Path) -> str:
    """What changes when the model's files do."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    identity = json.dumps([_FORMAT, str(path.resolve()), stats])
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _drop_old_entries(folder: Path) -> None:
    entries = sorted(folder.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
    for entry in entries[_MAX_ENTRIES:]:
        shutil.rmtree(entry, ignore_errors=True)

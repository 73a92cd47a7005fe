"""Where weights come from: names of Hugging Face models to tensors, one at a time.

Here is the reader of safetensors files; the one of GGUF files is in `gguf`. Pickles are never
loaded, because loading one runs whatever code it holds. What the tensors are for is not known.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from stallfree.errors import ModelError, WeightFileError
from stallfree.model.cut import Cut
from stallfree.model.safetensors_file import SafetensorsFile

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[^/\\]+\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

Marks = tuple[int, ...]  # what tells a file from another, and from what it was before


class WeightSource(Protocol):
    """Named tensors, read when they are asked for."""

    @property
    def opened(self) -> Mapping[Path, Marks]:
        """The files they come from, if any, with their marks from just before they were opened."""
        ...

    def names(self) -> frozenset[str]:
        """All names, as Hugging Face has them, such as `model.layers.0.mlp.up_proj.weight`."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a tensor.

        Raises:
            WeightFileError: there is none of that name.
        """
        ...

    def tensor(self, name: str, cut: Cut | None = None) -> torch.Tensor:
        """A tensor or a part of it, on the CPU; of its file no more is read than it takes.

        Raises:
            WeightFileError: there is none of that name, or it cannot be read.
        """
        ...


class SafetensorsWeights:
    """The safetensors files of a folder; tensors keep the dtype they are stored with.

    Attributes:
        opened: the files and the index, with their marks from just before they were opened.

    Raises:
        WeightFileError: a file is missing, truncated or corrupt, or the index contradicts them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / _INDEX
        self.opened = {index: path_marks(index)}
        if index.is_file():
            self._shard_of = self._read_index(index)
        elif (folder / _SINGLE).is_file():
            self._shard_of = {}
        else:
            raise WeightFileError(_nothing_to_load(folder))
        files = set(self._shard_of.values()) or {_SINGLE}
        self.opened |= {folder / name: path_marks(folder / name) for name in files}
        self._shards = {name: SafetensorsFile(folder / name) for name in sorted(files)}
        if not self._shard_of:
            self._shard_of = dict.fromkeys(self._shards[_SINGLE].names, _SINGLE)
        for name, file in self._shard_of.items():
            if name not in self._shards[file].names:
                raise WeightFileError(f"{index} says that {name} is in {file}; it is not")

    def names(self) -> frozenset[str]:
        """All names that the files hold."""
        return frozenset(self._shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a tensor.

        Raises:
            WeightFileError: there is none of that name.
        """
        return self._shard(name).shape(name)

    def tensor(self, name: str, cut: Cut | None = None) -> torch.Tensor:
        """The tensor, or a part of it, as it is stored.

        Raises:
            WeightFileError: there is none of that name, or it cannot be read.
        """
        return self._shard(name).tensor(name, cut)

    def _shard(self, name: str) -> SafetensorsFile:
        file = self._shard_of.get(name)
        if file is None:
            raise WeightFileError(f"{self._folder} has no weight {name}")
        return self._shards[file]

    def _read_index(self, path: Path) -> dict[str, str]:
        shard_of = read_json(path).get("weight_map")
        if not isinstance(shard_of, dict) or not shard_of:
            raise WeightFileError(f"{path} has no weight_map")
        for name, file in shard_of.items():
            if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
                raise WeightFileError(
                    f"{path} places {name} in {file!r:.200}; "
                    f"weights are only read from safetensors files directly in {self._folder}"
                )
        return shard_of


class HeldWeights:
    """Tensors in memory.

    Attributes:
        opened: empty, as there are no files.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.opened: Mapping[Path, Marks] = {}
        self._tensors = tensors

    def names(self) -> frozenset[str]:
        """All names."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a tensor.

        Raises:
            WeightFileError: there is none of that name.
        """
        return tuple(self.tensor(name).shape)

    def tensor(self, name: str, cut: Cut | None = None) -> torch.Tensor:
        """The tensor, or a copy of a part of it.

        Raises:
            WeightFileError: there is none of that name.
        """
        if name not in self._tensors:
            raise WeightFileError(f"there is no weight {name}")
        tensor = self._tensors[name]
        return tensor if cut is None else cut.of(tensor)


def marks_of(stat: os.stat_result) -> Marks:
    """The marks of a file: they stay while it is the same file with the same content.

    Only a file that is written twice within moments, at the same size, can keep them.
    """
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino


def path_marks(path: Path) -> Marks:
    """The marks of the file at `path`; empty if there is none, or it cannot be told."""
    try:
        return marks_of(path.stat())
    except OSError:
        return ()


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: there is no such file, it is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _nothing_to_load(folder: Path) -> str:
    message = f"{folder} has neither {_SINGLE} nor {_INDEX}"
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        message += (
            f"; {pickles[0]} is a pickle, which can run any code when it is loaded and is "
            "therefore never loaded: convert it to safetensors"
        )
    elif any(folder.glob("*.gguf")):
        message += "; to use a .gguf file, name the file itself"
    return message

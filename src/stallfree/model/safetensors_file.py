"""One safetensors file: what its header says, and its tensors.

The library checks the header against the size of the file. It would map the tensors, and that is
why they are read here instead (see `file_bytes`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stallfree.errors import WeightFileError
from stallfree.model.cut import Cut
from stallfree.model.file_bytes import FileBytes

_LENGTH_BYTES = 8  # of the header's length, with which a file begins
# https://github.com/huggingface/safetensors#format; types that no model here has are left out.
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsFile:
    """The file at `path`.

    Attributes:
        names: of its tensors.

    Raises:
        WeightFileError: it is missing, truncated or corrupt.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise WeightFileError(f"{path} is missing; the model is incomplete: fetch it again")
        self._path = path
        try:
            self._bytes = FileBytes(path)
            with safe_open(path, framework="pt"):
                length = int.from_bytes(self._bytes.read(0, _LENGTH_BYTES).tobytes(), "little")
                header = json.loads(self._bytes.read(_LENGTH_BYTES, length).tobytes())
        except OSError as error:
            raise WeightFileError(f"{path} cannot be read: {error.strerror or error}") from error
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise WeightFileError(
                f"{path} is not a usable safetensors file: {error}; it may be truncated or corrupt"
            ) from None
        self._start = _LENGTH_BYTES + length
        self._entries: Mapping[str, Any] = {
            name: entry for name, entry in header.items() if name != "__metadata__"
        }
        self.names = frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a tensor that it has."""
        return tuple(self._entries[name]["shape"])

    def tensor(self, name: str, cut: Cut | None = None) -> torch.Tensor:
        """A tensor that it has, as it is stored; of a part of it, no more is read.

        Raises:
            WeightFileError: it cannot be read.
        """
        entry = self._entries[name]
        dtype = _TYPES.get(entry["dtype"])
        if dtype is None:
            raise WeightFileError(
                f"{self._path}: {name} is of type {entry['dtype']}, which is not implemented"
            )
        (first, end), shape = entry["data_offsets"], entry["shape"]
        start, num_bytes = self._start + first, end - first
        if cut is not None:
            rows, columns = cut.ranges(shape)
            width, size = math.prod(shape[1:]), dtype.itemsize
            start += (rows.start * width + columns.start) * size
            num_bytes = len(rows) * len(columns) * size
            shape = [len(rows), *([len(columns)] if len(shape) == 2 else shape[1:])]
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        if cut is None or len(columns) == width:
            values = self._bytes.read(start, num_bytes)
        else:
            values = self._bytes.read_rows(start, len(rows), len(columns) * size, width * size)
        return torch.from_numpy(values).view(dtype).reshape(shape)

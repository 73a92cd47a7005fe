"""What a GGUF file says of itself: its metadata, and where each tensor lies.

`gguf_parser.py` reads it. What the names mean is not known here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from stallfree.errors import WeightFileError
from stallfree.model.file_bytes import FileBytes

_LENGTH = struct.Struct("<Q")  # before each string

T = TypeVar("T", int, float, bool, str)


@dataclass(frozen=True, slots=True)
class StringArray:
    """Strings that stay as they are in the file until they are asked for."""

    count: int
    _buffer: bytearray
    _start: int

    def read(self, indices: Container[int] | None = None) -> list[str]:
        """Those at `indices`, or all of them; in the order of the file.

        Raises:
            UnicodeDecodeError: one is not UTF-8.
        """
        strings, position, length_at = [], self._start, _LENGTH.unpack_from
        wanted = range(self.count) if indices is None else indices
        for index in range(self.count):
            start = position + _LENGTH.size
            position = start + length_at(self._buffer, position)[0]
            if index in wanted:
                strings.append(self._buffer[start:position].decode())
        return strings


Value = int | float | bool | str | StringArray | npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies, and how it is stored.

    Attributes:
        name: as the file has it.
        shape: slowest-moving dimension first, as in torch; in elements.
        kind: its quantization.
        offset: of its first byte, from the start of the file.
        num_bytes: its size in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    _file: FileBytes

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value of `key`, None if there is none.

        Raises:
            WeightFileError: the value is of another type than `kind`, or a float is not finite.
        """
        value = self.metadata.get(key)
        if value is None:
            return None
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise WeightFileError(
                f"{self.path}: {key} is {value!r:.60} ({type(value).__name__}); "
                f"a {kind.__name__} is expected"
            )
        return value

    def strings(self, key: str, indices: Container[int] | None = None) -> list[str]:
        """Strings of the array under `key`, in order; empty if there is none.

        Args:
            key: of the metadata.
            indices: which ones; None for all.

        Raises:
            WeightFileError: it is something else, or not UTF-8.
        """
        value = self.metadata.get(key)
        if value is None:
            return []
        if not isinstance(value, StringArray):
            raise WeightFileError(f"{self.path}: {key} is not an array of strings")
        try:
            return value.read(indices)
        except UnicodeDecodeError as error:
            raise WeightFileError(f"{self.path}: {key} is not UTF-8: {error}") from None

    def integers(self, key: str) -> npt.NDArray[np.integer[Any]]:
        """The array of integers under `key`, empty if there is none.

        Raises:
            WeightFileError: it is something else.
        """
        value = self.metadata.get(key)
        if value is None:
            return np.empty(0, np.int32)
        if not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, np.integer):
            raise WeightFileError(f"{self.path}: {key} is not an array of integers")
        return value

    def data(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor: `(num_bytes,)`.

        Raises:
            WeightFileError: they cannot be read any more.
        """
        return self._file.read(info.offset, info.num_bytes)

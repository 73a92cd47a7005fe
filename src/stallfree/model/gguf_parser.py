"""Reading the header of a GGUF file.

Nothing in the file is believed: every count, length and offset is compared with the size of the
file before it is used, so that a corrupt or hostile one ends in an error, not in a crash, a hang
or a giant allocation. (The reader of the `gguf` package believes them all, and takes 9 s over a
vocabulary of 150,000.)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from stallfree.errors import WeightFileError
from stallfree.model.file_bytes import FileBytes
from stallfree.model.gguf_header import GgufHeader, StringArray, TensorInfo, Value

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_PIECE_BYTES = 1 << 20  # of the header, read at a time
_MAX_HEADER_BYTES = 128 << 20  # the largest vocabularies need some 20 MB
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 1 << 16
_MAX_ALIGNMENT = 1 << 16

_SCALARS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}
_UINT32 = struct.Struct("<I")
_UINT64 = struct.Struct("<Q")


def read_header(path: Path) -> GgufHeader:
    """Open the file at `path` and read its header; no tensor data is read.

    Raises:
        WeightFileError: it is not a GGUF file, cannot be read, or contradicts itself.
    """
    try:
        if not path.is_file():
            raise WeightFileError(f"{path} is not a file")
        file = FileBytes(path)
    except OSError as error:
        raise WeightFileError(f"{path} cannot be read: {error.strerror}") from error
    if file.read(0, min(len(_MAGIC), file.size)).tobytes() != _MAGIC:
        raise WeightFileError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
    return _Parser(path, file).header()


class _Parser:
    """Reads from the start of the file to the end of the tensor table."""

    def __init__(self, path: Path, file: FileBytes) -> None:
        self._path = path
        self._file = file
        self._buffer = bytearray()  # the file so far
        self._position = len(_MAGIC)
        self._limit = min(file.size, _MAX_HEADER_BYTES)

    def header(self) -> GgufHeader:
        version = self._uint32()
        if version not in _VERSIONS:
            order = " (big-endian)" if version & 0xFFFF == 0 and version else ""
            self._refuse(f"it has version {version}{order}; versions 2 and 3 can be read")
        num_tensors = self._count("tensors", _UINT64, _MAX_TENSORS)
        num_keys = self._count("metadata keys", _UINT64, _MAX_KEYS)
        metadata: dict[str, Value] = {}
        for _ in range(num_keys):
            key = self._name()
            if key in metadata:
                self._refuse(f"the metadata key {key!r} is there twice")
            metadata[key] = self._value(key)
        table = [self._tensor_info() for _ in range(num_tensors)]
        tensors = self._place(table, self._alignment(metadata))
        return GgufHeader(self._path, metadata, tensors, self._file)

    def _refuse(self, reason: str) -> NoReturn:
        raise WeightFileError(f"{self._path} is not a usable GGUF file: {reason}")

    def _take(self, num_bytes: int) -> int:
        """Step over `num_bytes`; where they start."""
        start = self._position
        if num_bytes > self._limit - start:
            what = "file" if self._limit == self._file.size else "largest header allowed"
            self._refuse(
                f"{num_bytes:,} bytes are needed at {start:,}, "
                f"beyond the {self._limit:,} bytes of the {what}"
            )
        self._position = start + num_bytes
        self._read_to(self._position)
        return start

    def _read_to(self, end: int) -> None:
        """Have the buffer hold what is before `end`, which is within the limit."""
        missing = end - len(self._buffer)
        if missing > 0:
            count = min(max(missing, _PIECE_BYTES), self._limit - len(self._buffer))
            self._buffer += self._file.read(len(self._buffer), count).tobytes()

    def _uint32(self) -> int:
        return int(_UINT32.unpack_from(self._buffer, self._take(_UINT32.size))[0])

    def _uint64(self) -> int:
        return int(_UINT64.unpack_from(self._buffer, self._take(_UINT64.size))[0])

    def _count(self, what: str, number: struct.Struct, maximum: int) -> int:
        count = int(number.unpack_from(self._buffer, self._take(number.size))[0])
        if count > maximum:
            self._refuse(f"it claims {count:,} {what}; the limit is {maximum:,}")
        return count

    def _name(self) -> str:
        length = self._count("bytes of a name", _UINT64, _MAX_NAME_BYTES)
        start = self._take(length)
        try:
            return self._buffer[start : start + length].decode()
        except UnicodeDecodeError:
            self._refuse(f"the name at byte {start:,} is not UTF-8")

    def _value_type(self, key: str) -> GGUFValueType:
        number = self._uint32()
        try:
            return GGUFValueType(number)
        except ValueError:
            self._refuse(f"{key!r} has the unknown type {number}")

    def _value(self, key: str) -> Value:
        kind = self._value_type(key)
        if kind is GGUFValueType.STRING:
            length = self._uint64()
            start = self._take(length)
            return self._buffer[start : start + length].decode(errors="replace")
        if kind is not GGUFValueType.ARRAY:
            value: Value = self._numbers(kind, 1)[0].item()
            return value
        kind = self._value_type(key)
        count = self._count(f"elements in {key!r}", _UINT64, self._limit)
        if kind is GGUFValueType.STRING:
            return self._string_array(count)
        if kind is GGUFValueType.ARRAY:
            self._refuse(f"{key!r} is an array of arrays")
        return self._numbers(kind, count)

    def _numbers(self, kind: GGUFValueType, count: int) -> npt.NDArray[Any]:
        dtype = _SCALARS[kind]
        start = self._take(count * dtype.itemsize)
        return np.frombuffer(self._buffer, dtype, count, start).copy()

    def _string_array(self, count: int) -> StringArray:
        start = self._position
        self._take(count * _UINT64.size)  # there are at least the lengths
        position, limit, length_at = start, self._limit - _UINT64.size, _UINT64.unpack_from
        for _ in range(count):
            if position > limit:
                break
            if position + _UINT64.size > len(self._buffer):
                self._read_to(position + _UINT64.size)
            position += _UINT64.size + length_at(self._buffer, position)[0]
        self._position = start
        self._take(position - start)
        return StringArray(count, self._buffer, start)

    def _alignment(self, metadata: Mapping[str, Value]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if (
            type(alignment) is not int
            or not 8 <= alignment <= _MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            self._refuse(f"general.alignment is {alignment!r:.60}, not a power of two from 8")
        return alignment

    def _tensor_info(self) -> TensorInfo:
        """One entry of the table; its offset counts from the start of the data."""
        name = self._name()
        num_dimensions = self._count(f"dimensions of {name!r}", _UINT32, _MAX_DIMENSIONS)
        shape = tuple(self._uint64() for _ in range(num_dimensions))[::-1]
        number = self._uint32()
        offset = self._uint64()
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            self._refuse(f"tensor {name!r} has the unknown type {number}")
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or 0 in shape or shape[-1] % block_size:
            self._refuse(f"tensor {name!r} has the shape {shape}, impossible for {kind.name}")
        return TensorInfo(name, shape, kind, offset, math.prod(shape) // block_size * block_bytes)

    def _place(self, table: list[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """The tensors by name with offsets from the start of the file, which they must fill."""
        start = end = _padded(self._position, alignment)
        tensors: dict[str, TensorInfo] = {}
        for info in sorted(table, key=lambda info: info.offset):
            offset = start + info.offset
            if info.name in tensors:
                self._refuse(f"tensor {info.name!r} is there twice")
            if info.offset % alignment or offset < end:
                self._refuse(f"tensor {info.name!r} is misplaced: it starts at byte {offset:,}")
            end = offset + info.num_bytes
            if end > self._file.size:
                self._refuse(
                    f"tensor {info.name!r} ends at byte {end:,} and the file has "
                    f"{self._file.size:,}: it is truncated"
                )
            tensors[info.name] = TensorInfo(
                info.name, info.shape, info.kind, offset, info.num_bytes
            )
        if self._file.size > _padded(end, alignment):
            self._refuse(f"its tensors end at byte {end:,} and the file has {self._file.size:,}")
        return tensors


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment

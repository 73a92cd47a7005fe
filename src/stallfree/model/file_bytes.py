"""Parts of a file that somebody may change meanwhile.

It is read and not mapped. Whoever touches a mapped page of a file that was cut short is ended by
the system (SIGBUS); reading is told that there is no more, which is an error as any other.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stallfree.errors import WeightFileError

_PIECE_BYTES = 1 << 20  # read at a time: it is copied once more, from the processor's cache


class FileBytes:
    """A file of weights: the one that is at `path` now, even if another takes its place.

    Attributes:
        size: bytes in it when it was opened.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self.size = os.fstat(self._file).st_size

    def read(self, start: int, count: int) -> npt.NDArray[np.uint8]:
        """A new array of `count` bytes from `start` on.

        Raises:
            WeightFileError: the file ends before, or cannot be read.
        """
        values = np.empty(count, np.uint8)
        self._fill(values, start)
        return values

    def read_rows(self, start: int, rows: int, count: int, stride: int) -> npt.NDArray[np.uint8]:
        """A new array (rows * count,): `count` bytes at `start`, then `stride` later, and so on.

        Raises:
            WeightFileError: as above.
        """
        values = np.empty(rows * count, np.uint8)
        for number in range(rows):
            self._fill(values[number * count : (number + 1) * count], start + number * stride)
        return values

    def _fill(self, values: npt.NDArray[np.uint8], start: int) -> None:
        done = 0
        while done < len(values):
            try:
                wanted = min(len(values) - done, _PIECE_BYTES)
                piece = os.pread(self._file, wanted, start + done)
            except OSError as error:
                raise WeightFileError(f"{self._path} cannot be read: {error.strerror}") from error
            if not piece:
                size = os.fstat(self._file).st_size
                raise WeightFileError(
                    f"{self._path} has {size:,} bytes and had {self.size:,} when it was opened: it "
                    "was cut short meanwhile; start again when it is whole"
                )
            values[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)

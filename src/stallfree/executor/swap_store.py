"""The memory of the swap space: a slot for each block, in host memory or in a file.

A slot holds a block of all layers that this process has, one after the other. Which slot holds what
is said by whoever asks for copies (`core/swap.py`).
"""

from __future__ import annotations

import os
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

import torch

from stallfree.errors import ConfigError, CopyError

_AT_ONCE = 32  # blocks that are held between the KV cache and the slots
_ROUNDS = 5  # of measuring; the first one does not count, as memory may be touched first then


class Cache(Protocol):
    """A KV cache: see `KVCache` and `Int8KVCache`."""

    def blocks(self) -> list[torch.Tensor]:
        """All of it as views (layers, N, values of a block), some layers each."""
        ...


@dataclass(frozen=True, slots=True)
class CopyTimes:
    """Seconds to copy a block out, and in."""

    out_s: float
    in_s: float

    def slower_of(self, other: CopyTimes) -> CopyTimes:
        """The longer of both, each."""
        return CopyTimes(max(self.out_s, other.out_s), max(self.in_s, other.in_s))


class SwapStore:
    """Slots for blocks of a KV cache.

    Memory of a GPU's cache goes through pinned host memory; that is untested.

    Args:
        cache: of a decoder.
        num_slots: how many blocks are held.
        folder: where the file is. It has no name, so nothing is left of it however the process
            ends, and all of its room is taken at once. None for host memory.

    Raises:
        ConfigError: there is no room for it.
    """

    def __init__(self, cache: Cache, num_slots: int, folder: Path | None) -> None:
        self._blocks = cache.blocks()
        self._widths = [each.shape[0] * each.shape[2] for each in self._blocks]
        first, width = self._blocks[0], sum(self._widths)
        self._device = first.device
        self._num_measured = min(_AT_ONCE, num_slots, first.shape[1])
        self._rows: _HostRows | _FileRows
        if folder is None:
            self._rows = _HostRows(num_slots, width, first.dtype, is_pinned=first.is_cuda)
        else:
            self._rows = _FileRows(num_slots, width, first.dtype, folder)

    def copy(self, outs: Sequence[tuple[int, int]], ins: Sequence[tuple[int, int]]) -> None:
        """Copy blocks to slots, and then slots to blocks.

        Args:
            outs: a block and a slot each.
            ins: a slot and a block each.

        Raises:
            CopyError: the file cannot be written or read, there is no memory, or whatever else.
        """
        try:
            self._copy(outs, ins)
        except Exception as error:  # whatever it is, nothing may run on blocks that were not filled
            raise CopyError(f"the swap space cannot be used: {error}") from error

    def _settle(self) -> None:
        try:
            self._rows.settle()
        except OSError as error:
            raise CopyError(f"the swap space cannot be used: {error}") from error

    def _copy(self, outs: Sequence[tuple[int, int]], ins: Sequence[tuple[int, int]]) -> None:
        for some in _in_parts(outs):
            self._rows.write([slot for _, slot in some], self._read([block for block, _ in some]))
        for some in _in_parts(ins):
            self._write([block for _, block in some], self._rows.read([slot for slot, _ in some]))

    def measure(self) -> CopyTimes:
        """How long copying takes, with some of the blocks and slots; blocks stay as they are.

        Of a file, what the disk itself takes: as if the system kept none of it in memory.

        Raises:
            CopyError: see `copy`.
        """
        pairs = [(index, index) for index in range(self._num_measured)]
        times: list[tuple[float, float]] = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            self.copy(pairs, ())
            self._settle()
            between = time.perf_counter()
            self.copy((), pairs)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append((between - began, time.perf_counter() - between))
        outs, ins = zip(*times[1:], strict=True)
        return CopyTimes(median(outs) / len(pairs), median(ins) / len(pairs))

    def _read(self, blocks: list[int]) -> torch.Tensor:
        """What blocks hold: (n, values of a slot), in host memory."""
        index = torch.tensor(blocks, device=self._device)
        parts = [each.index_select(1, index).transpose(0, 1).flatten(1) for each in self._blocks]
        return torch.cat(parts, dim=1).cpu()

    def _write(self, blocks: list[int], rows: torch.Tensor) -> None:
        """Have blocks hold `rows` (n, values of a slot)."""
        index = torch.tensor(blocks, device=self._device)
        parts = rows.to(self._device).split(self._widths, dim=1)
        for each, part in zip(self._blocks, parts, strict=True):
            layers, _, width = each.shape
            each.index_copy_(1, index, part.reshape(-1, layers, width).transpose(0, 1))


def _in_parts(pairs: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    for first in range(0, len(pairs), _AT_ONCE):
        yield pairs[first : first + _AT_ONCE]


class _HostRows:
    """Slots in host memory, which is taken from the system as it is written."""

    def __init__(self, num_slots: int, width: int, dtype: torch.dtype, *, is_pinned: bool) -> None:
        try:
            self._memory = torch.empty((num_slots, width), dtype=dtype, pin_memory=is_pinned)
        except (RuntimeError, MemoryError) as error:
            num_bytes = num_slots * width * dtype.itemsize
            raise ConfigError(
                f"a swap space of {num_bytes} bytes cannot be allocated: lower swap_space"
            ) from error

    def write(self, slots: Sequence[int], rows: torch.Tensor) -> None:
        self._memory.index_copy_(0, torch.tensor(slots), rows)

    def read(self, slots: Sequence[int]) -> torch.Tensor:
        return self._memory.index_select(0, torch.tensor(slots))

    def settle(self) -> None:
        """Nothing is under way."""


class _FileRows:
    """Slots in a file without a name. It is not mapped, so that a bad disk is an OSError."""

    def __init__(self, num_slots: int, width: int, dtype: torch.dtype, folder: Path) -> None:
        self._width, self._dtype = width, dtype
        self._slot_bytes = width * dtype.itemsize
        num_bytes = num_slots * self._slot_bytes
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise ConfigError(
                f"a swap space of {num_bytes} bytes cannot be made in {folder} "
                f"({error.strerror}): lower swap_space, or name another folder in swap_dir"
            ) from error
        weakref.finalize(self, os.close, self._file)

    def write(self, slots: Sequence[int], rows: torch.Tensor) -> None:
        for slot, row in zip(slots, rows.view(torch.uint8).numpy(), strict=True):
            data, at = memoryview(row), slot * self._slot_bytes
            while data:
                count = os.pwrite(self._file, data, at)
                data, at = data[count:], at + count

    def read(self, slots: Sequence[int]) -> torch.Tensor:
        rows = torch.empty((len(slots), self._width), dtype=self._dtype)
        for slot, row in zip(slots, rows.view(torch.uint8).numpy(), strict=True):
            data, at = memoryview(row), slot * self._slot_bytes
            while data:
                count = os.preadv(self._file, [data], at)
                if count == 0:
                    raise OSError(f"the swap file ends at {at} bytes")
                data, at = data[count:], at + count
        return rows

    def settle(self) -> None:
        """Wait until all is on the disk, and have the system keep none of it in memory."""
        os.fdatasync(self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

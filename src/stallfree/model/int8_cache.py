"""int8 weights on disk: a model is quantized once, and mapped from then on.

They are found by the content of the model's files, wherever those are. Hashing that takes seconds,
so the hashes are kept too, in an index, until a file's size, times or inode change. While a model
is quantized its float weights are in memory one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from stallfree.cache import atomic_file, cache_folder, writing_to
from stallfree.errors import ModelError, WeightFileError
from stallfree.model.int8 import quantize_rows
from stallfree.model.weight_reader import SCALES
from stallfree.model.weights import SafetensorsWeights, WeightSource

_FORMAT = 2
_MAX_ENTRIES = 4
_FILE = "model.safetensors"
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
_LOCK = "lock"
_LOCK_TIMEOUT_S = 600.0  # quantizing some billions of weights takes minutes
_INDEX = "hashes.json"
_MAX_INDEX_FILES = 512  # more than any model has, so that one fits
_MAX_INDEX_BYTES = 4 << 20
_SETTLED_NS = 2_000_000_000  # file systems tell times apart that differ by this much
_SHA256 = re.compile("[0-9a-f]{64}")
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
    everything else is as in `weights`, in float32. Of processes that start together on a model
    that is not in the cache, one quantizes it and the others wait.

    Args:
        path: the model's folder or file; the cache notices when its content changes.
        weights: its own.
        on_tensor: called with how many tensors of how many are quantized, for progress.

    Raises:
        WeightFileError: a weight cannot be read.
    """
    entry = cache_folder() / "int8" / _key(path)
    cached = _read(entry)
    if cached is not None:
        return cached
    try:
        lock = _lock(entry.parent)
    except ModelError as error:
        _warn_not_kept(error)
        return HeldWeights(_quantize(weights, on_tensor))
    with lock:
        cached = _read(entry)
        return _make(path, entry, weights, on_tensor) if cached is None else cached


def _read(entry: Path) -> WeightSource | None:
    """The weights of an entry, marked as used now; None if there are none that are whole."""
    try:
        weights = SafetensorsWeights(entry)
    except (WeightFileError, OSError):
        return None
    with suppress(OSError):  # a cache that cannot be written can still be read
        os.utime(entry / _FILE)
    return weights


def _lock(folder: Path) -> AcquireReturnProxy[Any]:
    """Hold the lock of all entries while the returned object is used as a context.

    Raises:
        ModelError: the folder cannot be written, or another process holds the lock.
    """
    with writing_to(folder, num_bytes=0):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(folder / _LOCK, timeout=_LOCK_TIMEOUT_S).acquire()
        except Timeout:
            raise ModelError(
                f"another process has held {folder / _LOCK} for {_LOCK_TIMEOUT_S:.0f} s"
            ) from None
        except NotImplementedError as error:
            raise ModelError(f"{folder / _LOCK} cannot be locked: {error}") from None


def _make(
    path: Path, entry: Path, weights: WeightSource, on_tensor: Callable[[int, int], None] | None
) -> WeightSource:
    """Quantize the weights and keep them in `entry`, while the lock is held."""
    if (entry / _FILE).exists():
        _log.warning("making the damaged int8 weights in %s anew", entry)
    tensors = _quantize(weights, on_tensor)
    try:
        if _key(path) != entry.name:
            raise WeightFileError(f"{path} was changed while it was read")
        _tidy(entry)
        with atomic_file(entry / _FILE, sum(tensor.nbytes for tensor in tensors.values())) as file:
            save_file(tensors, file.name)
            with open(file.name, "rb") as saved:  # `save_file` may have put a new file there
                os.fsync(saved.fileno())
        return SafetensorsWeights(entry)
    except (ModelError, OSError, SafetensorError) as error:
        _warn_not_kept(error)
        return HeldWeights(tensors)


def _warn_not_kept(error: Exception) -> None:
    _log.warning("the int8 weights are not kept, so each start takes longer: %s", error)


def _quantize(
    weights: WeightSource, on_tensor: Callable[[int, int], None] | None
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    names = sorted(weights.names())
    for index, name in enumerate(names):
        tensors |= _quantize_one(name, weights.tensor(name))
        if on_tensor is not None:
            on_tensor(index + 1, len(names))
    return tensors


def _quantize_one(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if tensor.dim() != 2:
        return {name: tensor.float()}
    values, scales = quantize_rows(tensor.float())
    return {name: values, name + SCALES: scales}


def _tidy(current: Path) -> None:
    """Make room for `current`: drop the entries unused for longest, and what killed processes left.

    Whoever writes an entry holds the lock, so that a file which is not yet whole has no owner.
    """
    for file in current.parent.glob("*/*"):
        if file.name != _FILE:
            with suppress(OSError):
                file.unlink()
    others = [entry for entry in current.parent.iterdir() if entry.is_dir() and entry != current]
    others.sort(key=_last_used, reverse=True)
    for entry in others[_MAX_ENTRIES - 1 :]:
        shutil.rmtree(entry, ignore_errors=True)


def _last_used(entry: Path) -> float:
    try:
        return (entry / _FILE).stat().st_mtime
    except OSError:
        return 0.0  # it is empty


def _key(path: Path) -> str:
    """What changes when the content of the model's files does, and only then.

    Raises:
        WeightFileError: a file cannot be read.
    """
    files = [path]
    if path.is_dir():
        found = [file for pattern in _WEIGHT_FILES for file in path.glob(pattern)]
        files = sorted(file for file in found if file.is_file())
    hashes = _FileHashes(cache_folder() / "int8" / _INDEX)
    contents = [(str(file.relative_to(path)), hashes.sha256(file)) for file in files]
    hashes.save()
    return hashlib.sha256(json.dumps([_FORMAT, contents]).encode()).hexdigest()[:32]


class _FileHashes:
    """SHA-256 of files; the newest are remembered in an index, a JSON file.

    A file is taken for unchanged while its size, times and inode are. They can stay when it is
    written twice within moments, so one that was written just now is not remembered.
    """

    def __init__(self, index: Path) -> None:
        self._index = index
        self._known = _read_index(index)
        self._is_new = False

    def sha256(self, file: Path) -> str:
        """The hash of a file, in hexadecimal.

        Raises:
            WeightFileError: it cannot be read.
        """
        try:
            name = str(file.resolve())
            started = time.time_ns()
            with file.open("rb") as stream:
                stat = os.fstat(stream.fileno())
                known = self._known.get(name)
                if known is not None and known[:-1] == _marks(stat):
                    return str(known[-1])
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                is_same = _marks(os.fstat(stream.fileno())) == _marks(stat)
        except OSError as error:
            raise WeightFileError(f"{file} cannot be read: {error.strerror}") from error
        if is_same and stat.st_ctime_ns + _SETTLED_NS <= started:
            self._known.pop(name, None)  # so that it becomes the newest
            self._known[name] = [*_marks(stat), digest]
            self._is_new = True
        return digest

    def save(self) -> None:
        """Write the index if there is something new; if it cannot be written, do without."""
        if not self._is_new:
            return
        newest = dict(list(self._known.items())[-_MAX_INDEX_FILES:])
        content = json.dumps(newest).encode()
        try:
            with atomic_file(self._index, len(content)) as file:
                file.write(content)
        except ModelError as error:
            _log.info("the hashes of weight files are not kept: %s", error)


def _marks(stat: os.stat_result) -> list[int]:
    """What tells a file from another, or from what it was before."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read_index(path: Path) -> dict[str, list[int | str]]:
    """The records of an index: by file, its marks and its hash; none if it is broken."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_INDEX_BYTES:
            return {}
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(index, dict):
        return {}
    return {name: record for name, record in index.items() if _is_record(record)}


def _is_record(value: object) -> bool:
    return (
        isinstance(value, list)
        and [type(mark) for mark in value] == [int, int, int, int, str]
        and _SHA256.fullmatch(value[-1]) is not None
    )

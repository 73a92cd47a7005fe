"""int8 weights on disk: a model is quantized once, and read from then on.

They are found by the content of the model's files, wherever those are. Hashing that takes seconds,
so the hashes are kept too, in an index, until a file's size, times, device or inode change. While a
model is quantized its float weights are in memory one tensor at a time.
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
from stallfree.model.int8 import quantize_rows, weight_levels
from stallfree.model.weight_reader import SCALES
from stallfree.model.weights import (
    HeldWeights,
    SafetensorsWeights,
    WeightSource,
    marks_of,
    path_marks,
)

__all__ = ["HeldWeights", "int8_weights"]

_FORMAT = 3
_MAX_ENTRIES = 4
_FILE = "model.safetensors"
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
_LOCK_TIMEOUT_S = 600.0  # quantizing some billions of weights takes minutes
_INDEX = "hashes.json"
_MAX_INDEX_FILES = 512  # more than any model has, so that one fits
_MAX_INDEX_BYTES = 4 << 20
_SETTLED_NS = 2_000_000_000  # file systems tell times apart that differ by this much
_SHA256 = re.compile("[0-9a-f]{64}")
_log = logging.getLogger(__name__)


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
        WeightFileError: a weight cannot be read, or a file has changed since it was opened.
    """
    entry = cache_folder() / "int8" / _key(path)
    _refuse_if_changed(path, weights)
    cached = _read(entry, logging.WARNING)
    if cached is not None:
        return cached
    try:
        lock = _lock(entry)
    except ModelError as error:
        _warn_not_kept(error)
        return HeldWeights(_quantize(path, entry.name, weights, on_tensor))
    with lock:
        # Another process may have made it by now. What is wrong with it otherwise has been said.
        return _read(entry, logging.DEBUG) or _keep(
            entry, _quantize(path, entry.name, weights, on_tensor)
        )


def _read(entry: Path, level: int) -> WeightSource | None:
    """The weights of an entry, marked as used now; None if there are none, or they cannot be read.

    Why they cannot be read is logged with `level`.
    """
    try:
        if not (entry / _FILE).exists():
            return None
        weights = SafetensorsWeights(entry)
    except (WeightFileError, OSError) as error:
        _log.log(level, "the int8 weights in %s are made anew: %s", entry, error)
        return None
    with suppress(OSError):  # a cache that cannot be written can still be read
        os.utime(entry / _FILE)
    return weights


def _lock_file(entry: Path) -> Path:
    """It lies beside the entry and is never removed, so that all processes lock the same file."""
    return entry.with_name(f"{entry.name}.lock")


def _lock(entry: Path) -> AcquireReturnProxy[Any]:
    """Hold the lock of an entry while the returned object is used as a context.

    Raises:
        ModelError: the folder cannot be written, or another process holds the lock.
    """
    file = _lock_file(entry)
    with writing_to(file.parent, num_bytes=0):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, timeout=_LOCK_TIMEOUT_S)
        try:
            with suppress(Timeout):
                return lock.acquire(timeout=0)
            _log.warning("waiting for another process that rounds this model (it holds %s)", file)
            return lock.acquire()
        except Timeout:
            raise ModelError(f"another process has held {file} for {_LOCK_TIMEOUT_S:g} s") from None
        except NotImplementedError as error:
            raise ModelError(f"{file} cannot be locked: {error}") from None


def _keep(entry: Path, tensors: dict[str, torch.Tensor]) -> WeightSource:
    """Write the tensors into `entry`, whose lock is held; what to read them from."""
    try:
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
    path: Path, key: str, weights: WeightSource, on_tensor: Callable[[int, int], None] | None
) -> dict[str, torch.Tensor]:
    """All tensors, which are of the content that `key` stands for.

    Raises:
        WeightFileError: a weight cannot be read, or a file has changed since it was opened.
    """
    tensors: dict[str, torch.Tensor] = {}
    names = sorted(weights.names())
    for index, name in enumerate(names):
        tensors |= _quantize_one(name, weights.tensor(name))
        if on_tensor is not None:
            on_tensor(index + 1, len(names))
    _refuse_if_changed(path, weights, key)
    return tensors


def _refuse_if_changed(path: Path, weights: WeightSource, key: str | None = None) -> None:
    """Make sure that what is at `path` is what was opened, as an open file outlives its name.

    A file that is written twice within moments can keep its marks, so a key can be compared too.
    """
    marks = {file: path_marks(file) for file in weights.opened}
    if marks != weights.opened or (key is not None and key != _key(path)):
        raise WeightFileError(f"{path} changed while it was read; start again")


def _quantize_one(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if tensor.dim() != 2:
        return {name: tensor.float()}
    values, scales = quantize_rows(tensor.float(), weight_levels())
    return {name: values, name + SCALES: scales}


def _tidy(current: Path) -> None:
    """Make room for `current`: drop the entries unused for longest, and what killed processes left.

    Whoever writes an entry holds its lock, as the caller does that of `current`; entries whose
    lock is not free are left alone.
    """
    _remove_unfinished(current)
    others = [entry for entry in current.parent.iterdir() if entry.is_dir() and entry != current]
    others.sort(key=_last_used, reverse=True)
    for rank, entry in enumerate(others, start=1):
        with suppress(OSError, NotImplementedError), FileLock(_lock_file(entry), timeout=0):
            _remove_unfinished(entry)
            if rank >= _MAX_ENTRIES:
                shutil.rmtree(entry, ignore_errors=True)


def _remove_unfinished(entry: Path) -> None:
    for file in entry.glob("*"):
        if file.name != _FILE:
            with suppress(OSError):
                file.unlink()


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
    made_of = json.dumps([_FORMAT, weight_levels(), contents])
    return hashlib.sha256(made_of.encode()).hexdigest()[:32]


class _FileHashes:
    """SHA-256 of files; the newest are remembered in an index, a JSON file.

    A file is taken for unchanged while its marks are. They can stay when it is written twice
    within moments, so one that was written just now is not remembered.
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
                if known is not None and known[:-1] == [*marks_of(stat)]:
                    return str(known[-1])
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                is_same = marks_of(os.fstat(stream.fileno())) == marks_of(stat)
        except OSError as error:
            raise WeightFileError(f"{file} cannot be read: {error.strerror}") from error
        if is_same and stat.st_ctime_ns + _SETTLED_NS <= started:
            self._known.pop(name, None)  # so that it becomes the newest
            self._known[name] = [*marks_of(stat), digest]
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
        and [type(mark) for mark in value] == [int] * 5 + [str]
        and _SHA256.fullmatch(value[-1]) is not None
    )

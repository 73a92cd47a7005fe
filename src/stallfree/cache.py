"""The cache folder, and writing a file into it so that nobody ever sees half of it.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from stallfree.errors import ModelError


def cache_folder() -> Path:
    """`$STALLFREE_CACHE`, or `stallfree` in `$XDG_CACHE_HOME`, or `~/.cache/stallfree`.

    It need not exist.
    """
    own = os.environ.get("STALLFREE_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "stallfree"
    return Path("~/.cache/stallfree").expanduser()


@contextmanager
def atomic_file(path: Path, num_bytes: int) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place when the block ends.

    Folders are made as needed. If the block raises, the temporary file is removed and `path`
    stays as it was.

    Args:
        path: the file to write.
        num_bytes: how many bytes are about to be written.

    Raises:
        ModelError: there is no room for `num_bytes`, or the folder cannot be written.
    """
    with writing_to(path.parent, num_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < num_bytes:
            raise OSError(errno.ENOSPC, "no space left")
        prefix = temporary_prefix(path)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, delete=False) as file:
            try:
                yield file  # type: ignore[misc]  # it has all that BinaryIO has
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def temporary_prefix(path: Path) -> str:
    """How the names of temporary files for `path` start; a process that is killed leaves them."""
    return f".{path.name}."


@contextmanager
def writing_to(folder: Path, num_bytes: int) -> Iterator[None]:
    """Turn an `OSError` of the block into a ModelError that says what to do about `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"is on a disk without room for {num_bytes:,} more bytes"
        else:
            problem = f"cannot be written ({error.strerror or error})"
        raise ModelError(
            f"the cache folder {folder} {problem}; "
            "free some space or set STALLFREE_CACHE to another folder"
        ) from error

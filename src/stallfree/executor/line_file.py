"""A file that lines are added to while requests run: what goes wrong with it stops nobody."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)


class LineFile:
    """Opened for each line, so that it is whole whenever it is read, and nothing is to be closed.

    A line for which there is no room is left out; of the first, a warning is logged.

    Args:
        path: of the file; what was there before is gone.
        first: its first line.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, first: str) -> None:
        self._path = path
        self._has_failed = False
        path.write_text(first, encoding="utf-8")

    def add(self, line: str) -> None:
        """Add a line, whole or not at all."""
        try:
            self._add(line.encode())
        except OSError as error:
            if not self._has_failed:
                message = "%s cannot be written (%s), so lines are left out until it can be"
                _log.warning(message, self._path, error.strerror)
            self._has_failed = True

    def _add(self, line: bytes) -> None:
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            if file.write(line) < len(line):
                file.truncate(size)  # rather no line than half of one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

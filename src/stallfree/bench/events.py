"""Server-sent events from bytes, by the WHATWG standard. Knows nothing of what they carry.

Of the fields only `data` is kept, which is all that OpenAI's API uses.
"""

from __future__ import annotations

import re

MAX_EVENT_BYTES = 16 << 20
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventReader:
    """Events of one stream, whose bytes may be split anywhere."""

    def __init__(self) -> None:
        self._rest = b""  # of a line whose end has not come
        self._data: list[bytes] = []  # of an event whose end has not come
        self._num_bytes = 0  # of that event
        self._is_first_line = True
        self._ended_in_cr = False

    def feed(self, chunk: bytes) -> list[str]:
        """Take more bytes, and return the data of each event that they complete.

        Raises:
            ValueError: an event is longer than `MAX_EVENT_BYTES`.
        """
        if not chunk:
            return []
        if self._ended_in_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._ended_in_cr = chunk.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + chunk)
        events = [event for event in map(self._take, lines) if event is not None]
        if self._num_bytes + len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event is longer than {MAX_EVENT_BYTES:,} bytes")
        return events

    def _take(self, line: bytes) -> str | None:
        """The data of the event that `line` ends, if it is empty and there was any."""
        if self._is_first_line:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._is_first_line = False
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._num_bytes += len(value)
            return None
        if not self._data:
            return None
        data = b"\n".join(self._data).decode(errors="replace")
        self._data.clear()
        self._num_bytes = 0
        return data

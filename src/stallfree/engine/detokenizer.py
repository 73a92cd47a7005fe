"""Tokens to text, one at a time: no half characters, no part of a stop string.

Knows the text of one completion; nothing of scheduling.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What is needed of a tokenizer."""

    special_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""
        ...


class Detokenizer:
    """The growing text of one completion. Special tokens add nothing to it."""

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """Text that is complete with this token; what is still half a character is kept."""
        if token_id in self._tokenizer.special_ids:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """The last text: a replacement character if half a character was left."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Lets text through up to the first stop string, and nothing that may become part of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text to let through, and the stop string that ended it, if one did.

        While `may_stop` is false, stop strings are text like any other.
        """
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found and may_stop:
            at, stop = min(found, key=lambda match: match[0])
            self._held = ""
            return text[:at], stop
        passed = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[passed:]
        return text[:passed], None

    def finish(self) -> str:
        """What was held back and turned out to be text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

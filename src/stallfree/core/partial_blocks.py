"""Blocks that begin as a request goes on, though they do not end so.

A key of the prefix cache stands for a whole block. Two requests that part in the middle of a block
share its beginning all the same: it can be copied, and the rest computed. So each block that can be
found is noted here under the key of the block before it, sorted by its tokens: the one with the
longest common beginning is next to where the tokens that are looked for would stand.

Only requests of the same user share beginnings of blocks. With them, prompts could be guessed token
by token, by what is told of cached tokens; with whole blocks, 16 tokens at a time are too many.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple


class Part(NamedTuple):
    """The first `num_tokens` tokens of a block."""

    num_tokens: int
    block: int


_NOTHING = Part(0, -1)


class _Entry(NamedTuple):
    tokens: tuple[int, ...]
    block: int


class PartialBlocks:
    """Blocks by what goes before them, whose they are, and what they hold."""

    def __init__(self) -> None:
        self._entries: dict[tuple[bytes, str], list[_Entry]] = {}
        self._places: dict[int, tuple[tuple[bytes, str], _Entry]] = {}  # by block

    @property
    def blocks(self) -> set[int]:
        """All that are noted."""
        return set(self._places)

    def add(self, block: int, before: bytes, user: str, tokens: Sequence[int]) -> None:
        """Note a block.

        Args:
            block: its id; it is not noted yet.
            before: the key of the block before it, or of the beginning.
            user: who computed it.
            tokens: that it holds.
        """
        place, entry = (before, user), _Entry(tuple(tokens), block)
        entries = self._entries.setdefault(place, [])
        entries.insert(bisect_left(entries, entry), entry)
        self._places[block] = place, entry

    def remove(self, block: int) -> None:
        """Forget a block, if it is noted."""
        place, entry = self._places.pop(block, (None, None))
        if place is None or entry is None:
            return
        entries = self._entries[place]
        del entries[bisect_left(entries, entry)]
        if not entries:
            del self._entries[place]

    def find(self, before: bytes, user: str, tokens: Sequence[int]) -> Part | None:
        """The block of a user that begins with the most of `tokens`; None without a common one."""
        entries = self._entries.get((before, user), [])
        at = bisect_left(entries, _Entry(tuple(tokens), -1))
        beside = entries[max(0, at - 1) : at + 1]
        parts = [Part(_num_common(each.tokens, tokens), each.block) for each in beside]
        best = max(parts, default=_NOTHING)
        return best if best.num_tokens else None


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many numbers both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))

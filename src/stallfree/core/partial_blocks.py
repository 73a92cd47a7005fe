"""Blocks that begin as a request goes on, though they do not end so.

A key of the prefix cache stands for a whole block. Two requests that part in the middle of a block
share its beginning all the same: it can be copied, and the rest computed. So each block that can be
found is noted here under the key of the block before it, sorted by its tokens: the one with the
longest common beginning is next to where the tokens that are looked for would stand.

By what is told of cached tokens a prompt could be guessed, here one token after the other, where
whole blocks take a guess of 16 at once. Keys begin with the name of an API key and a `cache_salt`,
so other tenants find nothing. Within those, requests that name another user do not either; a client
may name whom it likes, so that is no wall.

Tokens are bytes in plain tuples, which the garbage collector need not look through.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

_WORD = 4  # bytes of a token


class Part(NamedTuple):
    """The first `num_tokens` tokens of a block."""

    num_tokens: int
    block: int


_Place = tuple[bytes, str]  # the key before, and the user
_Entry = tuple[bytes, int]  # tokens, and the block that holds them


class PartialBlocks:
    """Blocks by what goes before them, whose they are, and what they hold."""

    def __init__(self) -> None:
        self._entries: dict[_Place, tuple[_Entry, ...]] = {}  # sorted
        self._noted: dict[int, tuple[_Place, _Entry]] = {}  # by block

    @property
    def blocks(self) -> set[int]:
        """All that are noted."""
        return set(self._noted)

    def add(self, block: int, before: bytes, user: str, tokens: Sequence[int]) -> None:
        """Note a block.

        Args:
            block: its id; it is not noted yet.
            before: the key of the block before it, or of the beginning.
            user: who computed it.
            tokens: that it holds.
        """
        place, entry = (before, user), (_content(tokens), block)
        entries = self._entries.get(place, ())
        at = bisect_left(entries, entry)
        self._entries[place] = (*entries[:at], entry, *entries[at:])
        self._noted[block] = place, entry

    def remove(self, block: int) -> None:
        """Forget a block, if it is noted."""
        if block not in self._noted:
            return
        place, entry = self._noted.pop(block)
        left = tuple(each for each in self._entries[place] if each is not entry)
        if left:
            self._entries[place] = left
        else:
            del self._entries[place]

    def find(self, before: bytes, user: str, tokens: Sequence[int]) -> Part | None:
        """The block of a user that begins with the most of `tokens`; None without a common one."""
        entries = self._entries.get((before, user))
        if entries is None:
            return None
        content = _content(tokens)
        at = bisect_left(entries, (content, -1))
        beside = entries[max(0, at - 1) : at + 1]
        best = max(Part(_num_common(held, content), block) for held, block in beside)
        return best if best.num_tokens else None


def _content(tokens: Sequence[int]) -> bytes:
    return array("I", tokens).tobytes()


def _num_common(one: bytes, other: bytes) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    words = range(0, shorter, _WORD)
    differing = (at for at in words if one[at : at + _WORD] != other[at : at + _WORD])
    return next(differing, shorter) // _WORD

"""Requests of one group, which have the same prompt: one computes it, the rest share its blocks.

Only full blocks are shared, so nothing is ever copied. Nothing here allocates or counts holders:
the scheduler does.
"""

from __future__ import annotations

from stallfree.core.request import Request


class Siblings:
    """The live requests of each group, in order of arrival.

    Args:
        block_size: tokens of a KV block.
        may_share: whether they share blocks at all; if not, nobody waits for another either.
    """

    def __init__(self, block_size: int, *, may_share: bool) -> None:
        self.block_size = block_size
        self._may_share = may_share
        self._groups: dict[str, list[Request]] = {}

    def add(self, request: Request) -> None:
        """A request arrived; one without a group has no siblings."""
        if request.group is not None:
            self._groups.setdefault(request.group, []).append(request)

    def remove(self, request: Request) -> None:
        """A request ended."""
        if request.group is None:
            return
        siblings = self._groups[request.group]
        siblings.remove(request)
        if not siblings:
            del self._groups[request.group]

    def must_wait(self, request: Request) -> bool:
        """Whether the prompt of `request` is being computed, or is about to be, by another."""
        if request.group is None or not self._may_share:
            return False
        siblings = self._groups[request.group]
        if any(s.num_confirmed_tokens >= s.num_prompt_tokens for s in siblings):
            return False
        return siblings[0] is not request

    def sharable_blocks(self, request: Request) -> list[int]:
        """Full blocks of the prompt that a sibling has computed; one token at least is left."""
        if request.group is None or not self._may_share:
            return []
        siblings = self._groups[request.group]
        source = max(siblings, key=lambda sibling: sibling.num_confirmed_tokens)
        num_tokens = min(
            source.num_confirmed_tokens, request.num_prompt_tokens, request.num_tokens - 1
        )
        return source.block_table[: num_tokens // self.block_size]

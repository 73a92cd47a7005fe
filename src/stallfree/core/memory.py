"""Who gets which KV blocks: what is found, what is allocated, what is left for others to grow.

Nothing here decides who is admitted or preempted: the scheduler and its policy do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from stallfree.core.batch import NO_COPIES, Copies, CopyIn, CopyWithin
from stallfree.core.blocks import BlockPool
from stallfree.core.policies import POLICIES
from stallfree.core.prefix_cache import PrefixCache, Sharing
from stallfree.core.request import Request
from stallfree.core.scheduler_config import SchedulerConfig
from stallfree.core.swap import SwapSpace
from stallfree.errors import ConfigError

_NOTHING: Mapping[int, int] = {}


class Memory:
    """The block tables of all requests.

    Args:
        config: says what is reserved, left free and shared.
        pool: of the blocks.
        salt: see `PrefixCache`.
        swap: where KV of preempted requests is kept; None: nowhere.

    Attributes:
        cache: finds what was computed before.
        watermark_blocks: free blocks that an admission leaves.
        num_asked, num_hit: tokens of prompts that were looked for at their first admission, and
            those whose KV was there.

    Raises:
        ConfigError: the pool is too small for what the policy reserves for one request.
    """

    def __init__(
        self, config: SchedulerConfig, pool: BlockPool, salt: bytes, swap: SwapSpace | None = None
    ) -> None:
        self.pool = pool
        self._swap = swap
        self._ins: list[CopyIn] = []  # of the next batch
        self._within: list[CopyWithin] = []
        if swap is not None:
            pool.on_forget = swap.note_forgotten
        self._reserves = POLICIES[config.policy].reserves_context
        self._context_blocks = pool.blocks_for(config.max_model_len)
        if self._reserves and self._context_blocks > pool.num_blocks:
            raise ConfigError(
                f"scheduler {config.policy} reserves the full context of {config.max_model_len} "
                f"tokens for each request, but the KV cache holds {pool.num_tokens}: lower "
                "max_model_len or raise kv_cache_memory"
            )
        sharing = Sharing.GROUPS if swap is None else Sharing.ITSELF
        sharing = Sharing.ALL if config.prefix_caching else sharing
        sharing = Sharing.NOTHING if self._reserves else sharing
        self.cache = PrefixCache(pool, sharing, salt, copies=config.copies_blocks)
        watermark = 0 if self._reserves else config.watermark
        self.watermark_blocks = int(watermark * pool.num_blocks)
        self.num_asked = self.num_hit = 0

    @property
    def swaps(self) -> bool:
        """Whether there is a swap space."""
        return self._swap is not None

    def num_found(self, request: Request) -> int:
        """Tokens of a request that waits whose KV is there, or in the swap space."""
        num_found = len(self.cache.find(request))
        num_swapped = len(self._swapped(request, num_found))
        part = None if num_swapped else self.cache.find_part(request, num_found)
        num_tokens = (num_found + num_swapped) * self.pool.block_size
        return num_tokens + (part.num_tokens if part else 0)

    def is_swapped(self, request: Request) -> bool:
        """Whether KV of a request that waits would be copied in."""
        return bool(self._swapped(request, len(self.cache.find(request))))

    def _swapped(self, request: Request, num_found: int) -> list[int]:
        """Slots of what follows on `num_found` blocks of a request."""
        if self._swap is None:
            return []
        num_usable = self.cache.num_usable(request)
        return self._swap.find(islice(request.block_keys, num_found, num_usable))

    def blocks_taken(self, request: Request, released: Mapping[int, int] = _NOTHING) -> int:
        """Free blocks that an admission takes: all but those that it shares with who holds them.

        Args:
            request: that is to be admitted.
            released: how many holders blocks are to lose before that.
        """
        found = self.cache.find(request)
        shared = sum(self.pool.num_holders(block) > released.get(block, 0) for block in found)
        return self._blocks_of(request) - shared

    def most_left(self, request: Request, victims: Iterable[Request]) -> int:
        """Free blocks that were left if all `victims` were preempted and `request` admitted."""
        theirs = Counter(block for victim in victims for block in victim.block_table)
        freed = sum(self.pool.num_holders(block) == count for block, count in theirs.items())
        return self.pool.num_free + freed - self.blocks_taken(request, theirs)

    def missing_blocks(self, request: Request) -> int:
        """Blocks that a running request lacks for its next token."""
        return self.pool.blocks_for(request.num_tokens) - len(request.block_table)

    def admit(self, requests: Sequence[Request]) -> None:
        """Give requests their tables, together: what one finds is not allocated to another."""
        found = [self.cache.find(request) for request in requests]
        swapped = [self._swapped(*each) for each in zip(requests, map(len, found), strict=True)]
        parts = [
            None if slots else self.cache.find_part(request, len(blocks))
            for request, blocks, slots in zip(requests, found, swapped, strict=True)
        ]
        for blocks in found:
            self.pool.share(blocks)
        for request, blocks, slots, part in zip(requests, found, swapped, parts, strict=True):
            new = self.pool.allocate(self._blocks_of(request) - len(blocks))
            self._ins += map(CopyIn, slots, new)
            request.block_table = [*blocks, *new]
            request.num_kept_blocks = len(blocks)
            request.num_computed_tokens = (len(blocks) + len(slots)) * self.pool.block_size
            if part is not None:
                self._within.append(CopyWithin(part.block, new[0]))
                request.num_computed_tokens += part.num_tokens
            request.num_confirmed_tokens = len(blocks) * self.pool.block_size
            if self._swap is not None:
                self._swap.leave(request)
            if request.first_scheduled_at is None and self.cache.may_find(request):
                request.num_cached_tokens = request.num_computed_tokens
                self.num_asked += request.num_prompt_tokens
                self.num_hit += request.num_cached_tokens

    def preempt(self, request: Request, *, keeps: bool) -> bool:
        """Take a request's table back; whether what it held is kept in the swap space.

        Args:
            request: that is to wait again.
            keeps: whether that may be: not if what its blocks held is lost.
        """
        self._release(request)
        if self._swap is None or not keeps:
            return False
        count = request.num_confirmed_tokens // self.pool.block_size
        count = min(count, self.cache.num_usable(request))
        return self._swap.keep(request, request.block_keys[:count])

    def end(self, request: Request) -> None:
        """Take back all that a request holds."""
        self._release(request)
        if self._swap is not None:
            self._swap.leave(request)

    def forget(self) -> None:
        """All KV is lost."""
        self.pool.forget()
        if self._swap is not None:
            self._swap.forget()

    def stop_copying(self) -> None:
        """What is in the swap space is lost, and nothing is copied from now on."""
        self.cache.stop_copying()
        self.stop_swapping()

    def stop_swapping(self) -> None:
        """What is in the swap space is lost, and nothing is kept there from now on."""
        if self._swap is not None:
            self._swap.stop()

    def most_copy_s(self, *, may_admit: bool) -> float:
        """Most seconds that the copies of the next batch take."""
        return 0.0 if self._swap is None else self._swap.most_s(may_admit=may_admit)

    def next_copies(self) -> Copies:
        """What the next batch copies."""
        copies = NO_COPIES if self._swap is None else self._swap.next_copies(self._ins)
        if self._within:
            copies = replace(copies, within=tuple(self._within))
        self._ins.clear()
        self._within.clear()
        return copies

    def _release(self, request: Request) -> None:
        self.pool.release(request.block_table)
        request.block_table = []
        request.num_kept_blocks = 0

    def check_integrity(self, requests: Sequence[Request]) -> None:
        """Check that blocks and all live requests agree.

        Raises:
            IntegrityError: a block is lost, held by a request that should hold none, or found as
                what it does not hold.
        """
        self.pool.check_integrity(request.block_table for request in requests)
        self.cache.check_integrity(requests)
        if self._swap is not None:
            self._swap.check_integrity(requests)

    def _blocks_of(self, request: Request) -> int:
        """Blocks of its table when it is admitted."""
        if self._reserves:
            return self._context_blocks
        return self.pool.blocks_for(request.num_tokens)

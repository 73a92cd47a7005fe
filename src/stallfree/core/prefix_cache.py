"""KV blocks that were computed once and are used again: prefix caching.

A full block is known by a key: the SHA-256 of the key of the block before it and of its own tokens.
So a key stands for all tokens up to the end of its block. The chain begins from a salt that nobody
outside knows and the `cache_salt` of a request: requests with another one share nothing, and no
prompt can be made to collide with another's. Hashing with a salt after vLLM.

Only full blocks are shared, and only once the batch that computed them came back. A request writes
at positions after all that it found, so in blocks of its own: nothing that is shared is ever
written to. Where it goes on as a block begins, it writes to a copy of that (see `partial_blocks`).
At least one token is left to compute, since the next one is sampled from what comes of it.

Two requests may compute the same block, one because it may not use what is there. Then the first of
the two blocks is found, and the other one is known to its holder alone.
"""

from __future__ import annotations

import enum
from array import array
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from itertools import islice

from stallfree.core.blocks import BlockPool, IntegrityError
from stallfree.core.partial_blocks import Part
from stallfree.core.request import Request
from stallfree.core.targets import RANKS

_LEAST_PART = 4  # of a block, one in so many: less is not worth a copy
_TOKEN = "I"  # how a token id is hashed: an unsigned int of this machine


class Sharing(enum.Enum):
    """Who shares blocks."""

    ALL = "all requests with the same cache_salt"
    GROUPS = "the completions of one prompt"
    ITSELF = "the completions of one prompt; any other request finds what itself computed"
    NOTHING = "nobody"


class PrefixCache:
    """Names blocks by what they hold, and finds the beginning of a request among them.

    Args:
        pool: whose blocks they are.
        sharing: who shares them.
        salt: at the beginning of each chain of keys; random, where tenants do not trust each other.
        copies: whether blocks are copied, so that their beginnings can be shared.
    """

    def __init__(
        self, pool: BlockPool, sharing: Sharing, salt: bytes = b"", *, copies: bool = False
    ) -> None:
        self._pool = pool
        self._copies = copies
        self._sharing = sharing
        self._salt = salt
        self._promised: list[Counter[bytes]] = [Counter() for _ in RANKS]  # by rank: live prompts
        self._last: tuple[object, bytes, tuple[bytes, ...]] = (None, b"", ())

    def takes_part(self, request: Request) -> bool:
        """Whether others may share the blocks of a request."""
        if self._sharing is Sharing.GROUPS:
            return request.group is not None
        return self._sharing in (Sharing.ALL, Sharing.ITSELF)

    def may_find(self, request: Request) -> bool:
        """Whether it may use what is there: log probabilities of a prompt have to be computed."""
        return request.params.prompt_logprobs is None and self.takes_part(request)

    def num_usable(self, request: Request) -> int:
        """How many blocks at most are of use to a request: full ones, without its last token."""
        if not self.may_find(request):
            return 0
        return (request.num_tokens - 1) // self._pool.block_size

    def foresee(self, request: Request) -> None:
        """Note how much of a request that waits is there, and how much others will have computed.

        Others are those that are not of a lower tier, whether they run or wait.
        """
        block_size = self._pool.block_size
        self._make_keys(request, request.num_tokens // block_size)
        promised = self._promised[: request.targets.rank + 1]
        usable = self.num_usable(request)
        num_found = num_shared = len(self.find(request))
        while num_shared < usable:
            key = request.block_keys[num_shared]
            if self._pool.find(key) is None and not any(key in each for each in promised):
                break
            num_shared += 1
        request.num_found_tokens = num_found * block_size
        request.num_shared_tokens = num_shared * block_size

    def add(self, request: Request) -> None:
        """A request waits now: what its prompt holds will be computed."""
        self.foresee(request)
        self._promised[request.targets.rank].update(self._prompt_keys(request))

    def remove(self, request: Request) -> None:
        """A request ended, or is to be added anew."""
        promised = self._promised[request.targets.rank]
        for key in self._prompt_keys(request):
            promised[key] -= 1
            if not promised[key]:
                del promised[key]

    def find(self, request: Request) -> list[int]:
        """The blocks of the beginning of a request that waits, as far as they are there."""
        blocks = []
        for key in islice(request.block_keys, self.num_usable(request)):
            block = self._pool.find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def find_part(self, request: Request, num_found: int) -> Part | None:
        """A block that begins as a request that waits goes on after `num_found` blocks."""
        if not (self._copies and self.may_find(request)):
            return None
        first = num_found * self._pool.block_size
        tokens = request.tokens(first, min(first + self._pool.block_size, request.num_tokens - 1))
        before = self._before(request, num_found)
        part = self._pool.partial.find(before, request.targets.user, tokens)
        least = self._pool.block_size // _LEAST_PART
        return part if part is not None and part.num_tokens >= least else None

    def stop_copying(self) -> None:
        """Blocks cannot be copied: share only whole ones from now on."""
        self._copies = False

    def confirm(self, request: Request) -> None:
        """Let the full blocks of what came back of a running request be found."""
        count = request.num_confirmed_tokens // self._pool.block_size
        if count <= request.num_kept_blocks or not self.takes_part(request):
            return
        self._make_keys(request, count)
        for place in range(request.num_kept_blocks, count):
            self._keep(request, place)
        request.num_kept_blocks = count

    def _keep(self, request: Request, place: int) -> None:
        block, key = request.block_table[place], request.block_keys[place]
        self._pool.keep(block, key)
        if self._copies and self._pool.key_of(block) == key:
            size = self._pool.block_size
            tokens = request.tokens(place * size, (place + 1) * size)
            self._pool.partial.add(
                block, self._before(request, place), request.targets.user, tokens
            )

    def _before(self, request: Request, place: int) -> bytes:
        """The key of the block before the one at `place`."""
        return request.block_keys[place - 1] if place else self._root(request)

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Check that what can be found is what the tables of all live requests say.

        Raises:
            IntegrityError: a block has the key of something else, or a promise has no request.
        """
        promised: list[Counter[bytes]] = [Counter() for _ in RANKS]
        for request in requests:
            promised[request.targets.rank].update(self._prompt_keys(request))
            for place, block in enumerate(request.block_table):
                key = self._pool.key_of(block)
                is_kept = place < request.num_kept_blocks
                if key is not None and not (is_kept and key == request.block_keys[place]):
                    raise IntegrityError(f"block {block} is found as what it does not hold")
        if promised != self._promised:
            raise IntegrityError("what will be computed and the live requests disagree")

    def _prompt_keys(self, request: Request) -> Iterable[bytes]:
        return islice(request.block_keys, request.num_prompt_tokens // self._pool.block_size)

    def _make_keys(self, request: Request, count: int) -> None:
        """Make the keys of the first `count` blocks, as far as they are not made."""
        keys, block_size = request.block_keys, self._pool.block_size
        if len(keys) >= count or not self.takes_part(request):
            return
        root = b""
        if not keys:
            root = self._root(request)
            if self._last[:2] == (request.prompt_token_ids, root):
                keys += self._last[2]
        tokens = array(_TOKEN, request.tokens(len(keys) * block_size, count * block_size))
        content, width = tokens.tobytes(), block_size * tokens.itemsize
        key = keys[-1] if keys else root
        for start in range(0, len(content), width):
            key = sha256(key + content[start : start + width]).digest()
            keys.append(key)
        if root and request.group is not None:
            self._last = request.prompt_token_ids, root, tuple(self._prompt_keys(request))

    def _root(self, request: Request) -> bytes:
        """Where a chain begins; with the lengths, so that no two of them are spelled alike."""
        if self._sharing is Sharing.ALL:
            name = "all" if request.cache_salt is None else f"salt {request.cache_salt}"
        elif request.group is not None:
            name = f"group {request.group}"
        else:
            name = f"request {request.request_id}"
        salt = sha256(self._salt).digest()
        return sha256(salt + name.encode("utf-8", "surrogatepass")).digest()

"""What one iteration runs: chunks of requests, decodes and prefills together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from stallfree.core.request import Request


class Chunk(NamedTuple):
    """Consecutive tokens of one request that run in one iteration. A decode is a chunk of one.

    Attributes:
        request: whose tokens; an executor only reads it, and it is stable while in flight.
        start: position of the first token; everything before it is in the KV cache.
        num_tokens: how many run.
        samples: whether the last of them is the request's newest, so a token is sampled from it.
        is_decode: whether it continues an answer rather than reads a prompt.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    is_decode: bool

    @property
    def stop(self) -> int:
        """Position after the last token; also the length of the context it attends to."""
        return self.start + self.num_tokens


class CopyOut(NamedTuple):
    """A block that is copied to a slot of the swap space, and the key of what it holds."""

    block: int
    slot: int
    key: bytes


class CopyIn(NamedTuple):
    """A slot of the swap space that is copied to a block."""

    slot: int
    block: int


class CopyWithin(NamedTuple):
    """A block that is copied to another one."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Copies:
    """What is copied, once, before the chunks of a batch run: each kind before the next.

    Attributes:
        outs: blocks that others are about to write to.
        within: blocks whose beginnings the chunks share; a source may be the target of another.
        ins: blocks that the chunks read.
        seconds: that it is predicted to take.
    """

    outs: tuple[CopyOut, ...] = ()
    within: tuple[CopyWithin, ...] = ()
    ins: tuple[CopyIn, ...] = ()
    seconds: float = 0.0

    def __bool__(self) -> bool:
        """Whether there is anything to copy."""
        return bool(self.outs or self.within or self.ins)


NO_COPIES = Copies()


class Batch:
    """The chunks of one iteration, at most one for each request.

    Attributes:
        chunks: in the order in which their rows lie.
        num_tokens: tokens that run.
        num_decodes: chunks that continue an answer.
        sampling: the chunks that end in a sampled token, in order.
        token_limit: the budget that was in force; None without one.
        copies: within the KV cache, and between it and the swap space.
    """

    __slots__ = ("chunks", "copies", "num_decodes", "num_tokens", "sampling", "token_limit")

    def __init__(self, chunks: Iterable[Chunk], token_limit: int | None = None) -> None:
        self.token_limit = token_limit
        self.copies = NO_COPIES
        self.chunks = tuple(chunks)
        self.num_tokens = sum([chunk.num_tokens for chunk in self.chunks])
        self.num_decodes = sum([chunk.is_decode for chunk in self.chunks])
        self.sampling = tuple([chunk for chunk in self.chunks if chunk.samples])

    def without_copies(self) -> Batch:
        """The same chunks, once the copies are done."""
        return Batch(self.chunks, self.token_limit)

    def halves(self) -> tuple[Batch, ...]:
        """The batch in two, to be run one after the other; none if it is a single token.

        Decodes are parted from prompts first, then the earlier half of the requests from the later
        one. Of a single prompt, the tokens are halved. The copies are in neither half: they are
        done by then.
        """
        chunks = self.chunks
        first = [chunk for chunk in chunks if chunk.is_decode]
        second = [chunk for chunk in chunks if not chunk.is_decode]
        if not (first and second) and len(chunks) > 1:
            middle = len(chunks) // 2
            first, second = list(chunks[:middle]), list(chunks[middle:])
        elif len(chunks) == 1:
            chunk, half = chunks[0], chunks[0].num_tokens // 2
            if half == 0:
                return ()
            first = [chunk._replace(num_tokens=half, samples=False)]
            rest = chunk.num_tokens - half
            second = [chunk._replace(start=chunk.start + half, num_tokens=rest)]
        return Batch(first, self.token_limit), Batch(second, self.token_limit)

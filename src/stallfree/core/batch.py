"""What one iteration runs: chunks of requests, decodes and prefills together."""

from __future__ import annotations

from collections.abc import Iterable
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


class Batch:
    """The chunks of one iteration, at most one for each request.

    Attributes:
        chunks: in the order in which their rows lie.
        num_tokens: tokens that run.
        num_decodes: chunks that continue an answer.
        sampling: the chunks that end in a sampled token, in order.
        token_limit: the budget that was in force; None without one.
    """

    __slots__ = ("chunks", "num_decodes", "num_tokens", "sampling", "token_limit")

    def __init__(self, chunks: Iterable[Chunk], token_limit: int | None = None) -> None:
        self.token_limit = token_limit
        self.chunks = tuple(chunks)
        self.num_tokens = sum([chunk.num_tokens for chunk in self.chunks])
        self.num_decodes = sum([chunk.is_decode for chunk in self.chunks])
        self.sampling = tuple([chunk for chunk in self.chunks if chunk.samples])

    def halves(self) -> tuple[Batch, ...]:
        """The batch in two, to be run one after the other; none if it is a single token.

        Decodes are parted from prompts first, then the earlier half of the requests from the later
        one. Of a single prompt, the tokens are halved.
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

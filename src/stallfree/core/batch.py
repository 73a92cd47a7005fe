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

"""What one iteration runs: chunks of requests, decodes and prefills together."""

from __future__ import annotations

from dataclasses import dataclass

from stallfree.core.request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
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


@dataclass(frozen=True, slots=True)
class Batch:
    """The chunks of one iteration, at most one for each request."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that run."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_decodes(self) -> int:
        """Chunks that continue an answer."""
        return sum(chunk.is_decode for chunk in self.chunks)

    @property
    def sampling(self) -> tuple[Chunk, ...]:
        """The chunks that end in a sampled token, in order."""
        return tuple(chunk for chunk in self.chunks if chunk.samples)

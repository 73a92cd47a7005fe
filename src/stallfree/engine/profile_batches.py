"""Batches that are made up to be timed: random tokens at chosen contexts.

They lie in the blocks of a cache that nobody uses yet; what a policy would choose plays no part.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stallfree.core.batch import Batch, Chunk
from stallfree.core.blocks import BlockPool
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.step_time import BatchShape
from stallfree.executor.output import Executor

_LONGEST = 8192  # context of a batch drawn at random
_MOST_DECODES, _LONGEST_CHUNK = 16, 128


@dataclass(frozen=True, slots=True)
class Composition:
    """A batch to measure.

    Attributes:
        decodes: the context of each decode, its new token included.
        chunk_start, chunk_tokens: a chunk beside them; 0 tokens for none.
    """

    decodes: tuple[int, ...] = ()
    chunk_start: int = 0
    chunk_tokens: int = 0


def hybrid(max_context: int, count: int, seed: int) -> list[Composition]:
    """Hybrid batches drawn at random: up to 16 decodes beside a chunk of up to 128 tokens."""
    rng = random.Random(seed)
    longest = min(max_context, _LONGEST)
    made = []
    for _ in range(count):
        chunk = rng.randrange(1, min(_LONGEST_CHUNK + 1, longest))
        decodes = rng.randrange(1, _MOST_DECODES + 1)
        made.append(
            Composition(
                decodes=tuple(rng.randrange(1, longest) for _ in range(decodes)),
                chunk_start=rng.randrange(0, longest - chunk),
                chunk_tokens=chunk,
            )
        )
    return made


def grid(max_context: int) -> list[Composition]:
    """Batches from which the costs of tokens, contexts and samples can be told apart."""
    sizes = (1, 2, 4, 8, 16, 32, 64)
    made = [Composition(decodes=(64,) * size) for size in sizes]
    made += [Composition(chunk_tokens=size) for size in (8, 16, 32, 64, 96, 128, 256)]
    made += [
        Composition(decodes=(context,) * size)
        for size, context in ((1, 2000), (8, 1000), (8, 3000), (16, 500))
    ]
    made += [
        Composition(chunk_start=start, chunk_tokens=size)
        for start, size in ((1000, 32), (1000, 96), (3000, 32), (3000, 96), (3000, 256))
    ]
    made += [
        Composition((200,) * size, start, chunk)
        for size, start, chunk in ((4, 500, 28), (8, 0, 40), (8, 2000, 56), (16, 1000, 80))
    ]
    longest = max_context - 1
    fitting = [
        each
        for each in made
        if max((each.chunk_start + each.chunk_tokens, *each.decodes)) <= longest
    ]
    return fitting or [Composition(decodes=(1,)), Composition(chunk_tokens=longest)]


def measure(
    executor: Executor,
    pool: BlockPool,
    vocab_size: int,
    compositions: Sequence[Composition],
    repeats: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[tuple[BatchShape, float]]:
    """Run batches in rounds, so that a change of the machine's speed meets them all alike.

    Args:
        executor: its cache is overwritten.
        pool: says how many blocks there are; nothing is allocated from it, and what its blocks held
            is not found any more.
        vocab_size: of the random tokens.
        compositions: those that do not fit into the cache are left out.
        repeats: rounds; one more comes first and does not count.
        on_batch: called with how many batches of how many have run.

    Returns:
        Each batch's shape and the seconds that it took, once for each round.
    """
    pool.forget()
    batches = [batch for each in compositions if (batch := _batch(each, pool, vocab_size))]
    measured = []
    total = len(batches) * (repeats + 1)
    for run in range(total):
        batch = batches[run % len(batches)]
        started = time.perf_counter()
        executor.execute(batch)
        seconds = time.perf_counter() - started
        if run >= len(batches):
            measured.append((BatchShape.of(batch), seconds))
        if on_batch is not None:
            on_batch(run + 1, total)
    return measured


def _batch(composition: Composition, pool: BlockPool, vocab_size: int) -> Batch | None:
    """The batch, each of its requests in blocks of its own; None if there are not enough."""
    rng = random.Random(0)
    chunks: list[Chunk] = []
    next_block = 0
    parts = [(context - 1, 1, True) for context in composition.decodes]
    if composition.chunk_tokens:
        parts.append((composition.chunk_start, composition.chunk_tokens, False))
    for start, num_tokens, is_decode in parts:
        stop = start + num_tokens
        tokens = rng.choices(range(vocab_size), k=max(1, stop - is_decode))
        params = SamplingParams(temperature=0, max_tokens=2)
        request = Request(f"profile-{len(chunks)}", tokens, params, max_tokens=2)
        if is_decode:
            request.output_token_ids.append(rng.randrange(vocab_size))
        blocks = pool.blocks_for(request.num_tokens)
        request.block_table = list(range(next_block, next_block + blocks))
        request.num_computed_tokens = request.num_tokens - num_tokens
        next_block += blocks
        chunks.append(
            Chunk(
                request, request.num_computed_tokens, num_tokens, samples=True, is_decode=is_decode
            )
        )
    return Batch(tuple(chunks)) if next_block <= pool.num_blocks else None
